"""`python -m export.torch_runtime FOLDER`: continues a prompt and says how fast."""

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence

import torch

from export.torch_runtime.cache import LengthError
from export.torch_runtime.chat import ChatTemplate, until
from export.torch_runtime.config import FolderError
from export.torch_runtime.generate import SamplingConfig, Speed, generate
from export.torch_runtime.model import load_model
from export.torch_runtime.text import Tokenizer
from export.torch_runtime.weights import num_bytes

OK, BAD_ARGUMENT, BAD_FOLDER, NO_MEMORY = 0, 2, 3, 4


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.torch_runtime", description="Continues a prompt with an exported folder, in PyTorch."
    )
    parser.add_argument("folder", help="with config.json, safetensors and tokenizer.json, as `export` writes it")
    parser.add_argument("--prompt", help="the text to continue; without it stdin is read")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn in the folder's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most probable token")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the folder's on a GPU, float32 on a CPU"
    )
    parser.add_argument("--cache-length", type=int, metavar="N", help="default: what prompt and new tokens need")
    parser.add_argument("--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens read at a time")
    parser.add_argument("--compile", action="store_true", help="decode by torch.compile")
    parser.add_argument("--speculative", action="store_true", help="the model's MTP layers draft tokens")
    parser.add_argument("--kernels", choices=("torch", "triton"), default="torch", help="triton needs a GPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0; 2 where an argument cannot be used, 3 where the folder cannot, 4 where the GPU has too little memory.
    """
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except torch.OutOfMemoryError as error:
        print(
            f"error: {args.device} has too little memory for the weights and a cache of prompt and new tokens; shorten "
            f"--cache-length or --prefill-chunk, or store fewer bits (--dtype, a GPTQ folder): {error}",
            file=sys.stderr,
        )
        return NO_MEMORY
    except (FolderError, LengthError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_FOLDER if isinstance(error, FolderError) else BAD_ARGUMENT
    return OK


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: accepted are cpu, cuda, and cuda:0, cuda:1, …") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch finds no GPU; its build for CUDA and a driver are needed")
    index, number = device.index or 0, torch.cuda.device_count()
    if index >= number:
        raise ValueError(f"--device {name}: accepted are cuda:0 to cuda:{number - 1}, as PyTorch finds {number} GPUs")
    torch.cuda.set_device(index)  # Triton launches its kernels on the current one, wherever their tensors lie
    return device


def _run(args: argparse.Namespace) -> None:
    sampling = SamplingConfig(args.temperature, args.top_k, args.top_p, args.seed)
    device = _device(args.device)
    if args.kernels == "triton" and device.type != "cuda":
        raise ValueError(f"--kernels triton with --device {device}: Triton's kernels run on a GPU")
    if args.kernels == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError("--kernels triton: the package triton is not installed; PyTorch's builds for CUDA bring it")
    dtype = args.dtype or (None if device.type == "cuda" else "float32")
    model = load_model(args.folder, device, getattr(torch, dtype) if dtype else None, args.speculative)
    model.use_kernels(args.kernels)
    tokenizer = Tokenizer(args.folder, model.config)
    text, end = sys.stdin.read() if args.prompt is None else args.prompt, ""
    if args.chat:
        template = ChatTemplate(args.folder)
        prompt = tokenizer.encode(template.render([{"role": "user", "content": text}]))
        end = template.end_of_turn()
        if len(ids := tokenizer.encode(end)) == 1:  # a special token, which is no part of the text
            model.config = dataclasses.replace(model.config, eos_token_ids=(*model.config.eos_token_ids, *ids))
    else:
        prompt = tokenizer.encode_prompt(text)
    speed = Speed()
    tokens = generate(
        model,
        prompt,
        args.max_new_tokens,
        sampling,
        cache_length=args.cache_length,
        chunk=args.prefill_chunk,
        compiled=args.compile,
        speed=speed,
    )
    pieces = tokenizer.stream(tokens)
    for piece in until(pieces, end) if end else pieces:
        print(piece, end="", flush=True)
    print()
    drafts = f" ({speed.acceptance_length:.2f} in a step)" if args.speculative else ""
    print(
        f"prompt: {speed.prompt_tokens} tokens, {speed.prefill_rate:.1f} tokens/s; new: {speed.new_tokens} tokens, "
        f"{speed.decode_rate:.1f} tokens/s{drafts}; weights: {num_bytes(model) / 2**20:.1f} MiB on {device}",
        file=sys.stderr,
    )
