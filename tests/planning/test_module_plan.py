"""What a plan says of one target: bits and bytes."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from reparam_peft.planning.module_plan import ModulePlan, cells, columns, read_module_plan

IN_BITS = ModulePlan("a", (64, 64), 64, 4096, 0.5, (1.0,), form="dense", bits=4, stored_bytes=2304, dense_bytes=8192)


def test_tables_show_form_bits_and_bytes() -> None:
    assert [title for title, _ in columns(True, False)] == ["shape", "form", "bits", "rank", "bytes", "kept", "loss"]
    assert cells(IN_BITS, True, False) == ["64 x 64", "dense", "4", "dense", "2,304", "28.1%", "5.00e-01"]
    assert cells(IN_BITS, False, False)[1:3] == ["dense", "4,096"]
    codes = replace(IN_BITS, rank=None, form=None, bits=16, predicted_loss=0.0)
    assert cells(codes, True, False)[1:4] == ["", "own", "dense"], "as it arrived"
    assert IN_BITS.kept == pytest.approx(2304 / 8192)


def test_is_read_as_it_was_written() -> None:
    assert read_module_plan(asdict(IN_BITS)) == IN_BITS
    before = {"name", "shape", "rank", "stored_parameters", "predicted_loss", "spectrum"}  # files of before had no more
    old = read_module_plan({key: value for key, value in asdict(IN_BITS).items() if key in before})
    assert (old.form, old.bits, old.stored_bytes) == (None, 16, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 5),
        ("bits", True),
        ("form", "diagonal"),
        ("form", None),
        ("bits", 16),
        ("rank", 3),
        ("rank", None),
        ("stored_bytes", 0),
        ("dense_bytes", 1.5),
    ],
)
def test_wrong_fields_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"a: `?.*{field}"):
        read_module_plan({**asdict(IN_BITS), field: value})
