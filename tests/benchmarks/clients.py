"""What other programs and libraries make of compressed models: whether each does with them what it does with dense ones.

    python tests/benchmarks/clients.py [lm_eval serve timm diffusers]

`lm_eval` and `serve` run lm-evaluation-harness and `transformers serve` by `reparam run` on a standalone checkpoint of a tiny
Llama of random weights: the first on a task of the script's own, compared with the harness on the model itself; the second
answers a request, compared with `generate`. `timm` and `diffusers` take a ResNet and a UNet of random weights through the
recipe of docs/clients.md: compressed with calibration data, saved, and loaded into a model without weights. Each needs its own
library: `pip install lm_eval`, `'transformers[serving]'`, `timm`, `diffusers`. One line is printed for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import init_empty_weights
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.models import byte_tokenizer, llama

from reparam_peft import ReparamConfig, compress

WORDS = ["compress", "weights", "matrix", "product", "rank", "kept"]
PROMPT, NEW_TOKENS, SECONDS = "a matrix of low rank", 12, 300


def main() -> None:
    """Print a line for each."""
    clients = {"lm_eval": lm_eval, "serve": serve, "timm": of_timm, "diffusers": of_diffusers}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(clients)}; all, where none is given")
    options = parser.parse_args()
    if unknown := set(options.clients) - set(clients):
        parser.error(f"there is no {', '.join(sorted(unknown))} here")
    for name in options.clients or clients:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {clients[name](Path(folder))}", flush=True)


def language_model() -> tuple[Any, PreTrainedTokenizerFast]:
    """A compressed Llama, and a tokenizer of bytes."""
    tokenizer = byte_tokenizer(bos=False)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    batches = [{"input_ids": torch.randint(3, 259, (4, 32))} for _ in range(4)]
    config = ReparamConfig(target_modules="all-linear", keep=0.7)
    return compress(llama(vocab_size=259), config, batches, progress=False).to_standalone().eval(), tokenizer


def lm_eval(folder: Path) -> str:
    """The accuracy on a task of choices, by the command line and by the library."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = language_model()
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "standalone")
    rows = [{"first": word, "choices": [word[::-1], word, "xyz"], "right": i % 3} for i, word in enumerate(WORDS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{first}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "choice.yaml").write_text(json.dumps(task))
    arguments = ["--model", "hf", "--model_args", f"pretrained={folder / 'standalone'}", "--tasks", "choice", "--device", "cpu"]
    arguments += ["--include_path", str(folder), "--output_path", str(folder / "out")]
    run("lm_eval", *arguments)
    (file,) = (folder / "out").rglob("results*.json")
    got = json.loads(file.read_text())["results"]["choice"]["acc,none"]
    known = TaskManager(include_path=str(folder), include_defaults=False)
    result = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=["choice"], task_manager=known)
    return f"accuracy {got:.3f}, and {result['results']['choice']['acc,none']:.3f} by the library on the model itself"


def serve(folder: Path) -> str:
    """The answer to a request, and what `generate` writes."""
    model, tokenizer = language_model()
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "standalone")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    request = {
        "model": str(folder / "standalone"),
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0.0,
        "stream": False,
    }
    with running("transformers", "serve", str(folder / "standalone"), "--port", str(port), "--device", "cpu") as server:
        answer = answered(f"http://localhost:{port}/v1/chat/completions", request, server)
    got = answer["choices"][0]["message"]["content"]
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return f"{'the same text as' if got == expected else 'another text than'} `generate`: {got!r}"


def run(*command: str) -> None:
    """Run a program by `reparam run`."""
    subprocess.run(program(*command), check=True, env=environment(), stdout=subprocess.DEVNULL)


def program(*command: str) -> list[str]:
    """The command line of a program."""
    return [str(Path(sys.executable).parent / "reparam"), "run", *command]


def environment() -> dict[str, str]:
    """Without the Hub."""
    return os.environ | {"HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Within this block a program runs."""
    process = subprocess.Popen(program(*command), env=environment())
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def answered(address: str, request: dict[str, Any], server: subprocess.Popen[bytes]) -> Any:
    """The answer of a server, which may be yet to start."""
    body = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
    start = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(body, timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{error}: {error.read().decode()}") from error
        except urllib.error.URLError:
            if time.monotonic() - start > SECONDS or server.poll() is not None:
                raise
            time.sleep(1)


def of_timm(folder: Path) -> str:
    """A ResNet."""
    import timm

    def make() -> nn.Module:
        model: nn.Module = timm.create_model("resnet18", zero_init_last=False)
        return model.eval()

    images = {"x": torch.rand(8, 3, 64, 64)}
    targets = r"layer[34]\..*conv[12]|fc"
    return through_the_recipe(make, images, targets, lambda model, batch: model(batch["x"]), folder)


def of_diffusers(folder: Path) -> str:
    """A UNet with attention."""
    from diffusers import UNet2DModel

    def make() -> nn.Module:
        blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
        return UNet2DModel(sample_size=32, layers_per_block=1, block_out_channels=(64, 128), **blocks).eval()

    noisy = {"sample": torch.randn(4, 3, 32, 32), "timestep": torch.tensor([1, 10, 100, 500])}
    targets = r".*(to_[qkv]|to_out\.0|conv[12])"

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        predicted: Tensor = model(**batch).sample
        return predicted.square().flatten(1).mean(1)

    return through_the_recipe(make, noisy, targets, loss, folder)


def through_the_recipe(
    make: Callable[[], nn.Module],
    batch: dict[str, Tensor],
    targets: str,
    objective: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    folder: Path,
) -> str:
    """How far a model that is loaded is from the one that was saved, and that from the dense one."""

    def output(model: nn.Module) -> Tensor:
        with torch.no_grad():
            made = model(**batch)
        tensor: Tensor = made if isinstance(made, Tensor) else made.sample
        return tensor

    torch.manual_seed(0)
    dense = make()
    before = output(dense)
    config = ReparamConfig(target_modules=targets, keep=0.7)
    small = compress(dense, config, [batch], objective=objective, progress=False).eval()
    after = output(small)
    small.save_pretrained(str(folder))
    save_file(peft.get_base_model_state_dict(small), folder / "rest.safetensors")
    with init_empty_weights():
        empty = make()
    again = PeftModel.from_pretrained(empty, str(folder), low_cpu_mem_usage=True)
    again.get_base_model().load_state_dict(load_file(folder / "rest.safetensors"), strict=False, assign=True)
    moved = float((output(again.eval()) - after).norm() / after.norm())
    stored = small.peft_config["default"].stored_parameters / small.peft_config["default"].dense_parameters
    lost = float((after - before).norm() / before.norm())
    return f"{stored:.2f} of the numbers, {lost:.3f} of the outputs' norm lost, {moved:.1e} between what was saved and loaded"


if __name__ == "__main__":
    main()
