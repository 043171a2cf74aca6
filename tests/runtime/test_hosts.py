from __future__ import annotations

from reparam_peft.runtime.hosts import extend


class Host:
    def method(self, x: int, *, y: int = 0) -> int:
        """Its own words."""
        return x + y

    @classmethod
    def made(cls, x: int) -> tuple[type, int]:
        return cls, x


def test_a_method_and_a_class_method_are_extended_once() -> None:
    for _ in range(2):
        extend(Host, "method", lambda original: lambda self, *args, **kwargs: 10 * original(self, *args, **kwargs))
        extend(Host, "made", lambda original: lambda cls, x: original(cls, x + 1))

    class Derived(Host):
        pass

    assert Derived().method(1, y=2) == 30
    assert Derived.made(1) == (Derived, 2)
    assert Host.method.__doc__ == "Its own words."
