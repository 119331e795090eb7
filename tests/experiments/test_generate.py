"""The verb `generate` on a random model: what is printed, what is written, and bad input."""

import io
import json

import jax
import jax.numpy as jnp
import pytest

from cpm_jax.checkpoints.manager import CheckpointConfig, Checkpointer, CheckpointError
from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError, config_to_dict
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.generate import Generator, Piece
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import init_params
from experiments.generate import Dialogue, GenerateConfig, Printer, Prompt, encode, read_batches, run
from experiments.run import main

TEXT = "the quick brown fox jumps over the lazy dog. "


def write_run(folder, vocab_size):
    """A workdir as a training leaves it, with a random model."""
    tokenizer = Tokenizer.train([TEXT * 3], vocab_size=290)
    config = ModelConfig(
        vocab_size=vocab_size or tokenizer.vocab_size,
        num_layers=1,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        d_ff=64,
        max_position_embeddings=128,
        initializer_range=0.3,
        dtype="float32",
    )
    with Checkpointer(folder / "checkpoints", CheckpointConfig(every=1)) as checkpointer:
        state = {"step": jnp.int32(1), "params": init_params(config, jax.random.key(0))}
        checkpointer.save(1, state, {"model": config_to_dict(config)})
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), vocab_size=None)


@pytest.fixture(scope="module")
def tokenizer(workdir):
    return Tokenizer.load(workdir / "tokenizer")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prints_and_writes_each_prompt_with_its_continuation(workdir, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    prompts = ("the quick", "jumps over the lazy dog", "a")
    run(GenerateConfig(prompts=prompts, max_new_tokens=20, batch_size=2, output=str(output)), workdir)
    written = records(output)
    assert [r["prompt"] for r in written] == list(prompts)
    assert [r["index"] for r in written] == [0, 1, 2]
    assert all(r["num_tokens"] == 20 or r["finish_reason"] == "eos" for r in written)
    shown = capsys.readouterr()
    assert shown.out == "".join(r["prompt"] + r["completion"] + "\n" for r in written)
    assert "3 prompts, " in shown.err
    assert "tokens/s" in shown.err


def test_the_batch_size_does_not_change_the_outputs(workdir, tmp_path, capsys):
    outputs = []
    for batch_size in (1, 2, 8):
        path = tmp_path / f"{batch_size}.jsonl"
        prompts = ("the quick", "jumps over", "a", "lazy dog. the", "fox")
        run(GenerateConfig(prompts=prompts, max_new_tokens=15, batch_size=batch_size, output=str(path)), workdir)
        outputs.append(records(path))
    assert outputs[0] == outputs[1] == outputs[2]


def test_weights_that_were_trained_dense_run_sparse(workdir, tmp_path, capsys):
    def completions(*flags):
        output = tmp_path / "out.jsonl"
        prompt = "the quick brown fox jumps over the lazy dog. the quick brown fox"
        given = [
            f"--gin.CHECKPOINT={workdir}",
            f"--gin.PROMPTS={prompt}",
            f"--gin.OUTPUT={output}",
            "--gin.TEMPERATURE=0",
        ]
        code = main(["generate", f"--workdir={tmp_path / 'work'}", "--gin_file=runs/generate.gin", *flags, *given])
        return [r["completion"] for r in records(output)] if code == exit_codes.OK else code

    sizes = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "window_size": 8, "dense_len": -1}
    small = ["--gin_file=arch/infllm_v2.gin", *(f"--gin.SparseConfig.{name}={value}" for name, value in sizes.items())]
    short = "--gin.MAX_NEW_TOKENS=40"
    dense = completions(short)
    assert completions(short, *small, "--gin.SparseConfig.topk=32") == dense  # all blocks
    assert completions(short, *small, "--gin.SparseConfig.topk=1") != dense
    assert completions(short, "--gin_file=arch/infllm_v2.gin") == dense  # shorter than DENSE_LEN
    capsys.readouterr()
    assert completions(short, "--gin_file=arch/infllm_v2.gin", "--gin.DENSE_LEN=-1") == exit_codes.BAD_CONFIG
    assert "SparseConfig.topk = 64: must be at most the 2 blocks of 64 tokens" in capsys.readouterr().err


def test_int8_weights_and_caches(workdir, tmp_path, capsys):
    def completions(*flags):
        output = tmp_path / "out.jsonl"
        given = [f"--workdir={workdir}", "--gin.PROMPTS=the quick brown", f"--gin.OUTPUT={output}"]
        given += ["--gin.TEMPERATURE=0", "--gin.MAX_NEW_TOKENS=20"]
        code = main(["generate", "--gin_file=runs/generate.gin", *given, *flags])
        return [r["completion"] for r in records(output)] if code == exit_codes.OK else code

    plain = completions()
    assert completions("--gin.WEIGHT_DTYPE=int8", "--gin.CACHE_DTYPE=int8") == plain
    capsys.readouterr()
    assert completions("--gin.CACHE_DTYPE=int2") == exit_codes.BAD_CONFIG
    assert "GenerateConfig.cache_dtype = 'int2': input should be" in capsys.readouterr().err


def test_reads_lines_from_the_terminal_until_it_ends(workdir, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick\n\nbrown fox\n"))
    run(GenerateConfig(max_new_tokens=5, sampling=SamplingConfig(temperature=0.0)), workdir)
    shown = capsys.readouterr()
    assert "2 prompts" in shown.err
    assert shown.out.startswith("the quick")
    assert "\nbrown fox" in shown.out


def test_from_the_command_line(workdir, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    arguments = ["generate", f"--workdir={tmp_path / 'job'}", f"--gin.CHECKPOINT={workdir}", "--gin.PROMPTS=the fox"]
    assert main([*arguments, "--gin.MAX_NEW_TOKENS=4", "--gin.TEMPERATURE=0", f"--gin.OUTPUT={output}"]) == 0
    (record,) = records(output)
    assert record["prompt"] == "the fox"
    assert capsys.readouterr().out == "the fox" + record["completion"] + "\n"


class TestPromptsFile:
    def test_text_and_jsonl(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo\n")
        turns = [{"role": "user", "content": "hi"}]
        (tmp_path / "a.jsonl").write_text(f'{{"prompt": "one"}}\n{json.dumps({"messages": turns})}\n')
        (batch,) = read_batches(GenerateConfig(prompts_file=str(tmp_path / "a.txt")))
        assert [prompt.content for prompt in batch] == ["one", "two"]
        (batch,) = read_batches(GenerateConfig(prompts_file=str(tmp_path / "a.jsonl")))
        assert [prompt.content for prompt in batch] == ["one", turns]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"prompt": "a"}\n{"prompt":\n', r"a.jsonl:2 is not JSON"),
            (b'{"text": "a"}\n', r'a.jsonl:1: must be an object with "prompt"'),
            (b"[1]\n", r'a.jsonl:1: must be an object with "prompt"'),
            (b"\n", "has no prompts"),
            (b"\xff\xfe\x00", "a.jsonl: .*utf-8"),
            (None, "a.jsonl: No such file"),
        ],
    )
    def test_bad_files(self, tmp_path, content, message):
        path = tmp_path / "a.jsonl"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_batches(GenerateConfig(prompts_file=str(path)))


class TestChat:
    def test_a_prompt_is_a_turn_of_the_user(self, tokenizer):
        ids = encode(Prompt("hi", "prompt 0"), tokenizer, chat=True)
        assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

    def test_messages_go_through_the_template(self, tokenizer):
        turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
        text = tokenizer.decode(encode(Prompt(turns, "a.jsonl:1"), tokenizer, chat=False))
        assert text.startswith("<|im_start|>system\nbe brief<|im_end|>")

    def test_the_end_of_the_turn_ends_the_output(self, tokenizer):
        assert tokenizer.require_chat_template().end_of_turn() == ("<|im_end|>",)

    def test_malformed_messages_name_their_line(self, tokenizer):
        with pytest.raises(InputError, match=r"a.jsonl:7"):
            encode(Prompt([{"content": "hi"}], "a.jsonl:7"), tokenizer, chat=False)

    def test_lines_of_the_terminal_are_turns_of_one_conversation(self, workdir, tmp_path, monkeypatch):
        output = tmp_path / "out.jsonl"
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\nand then?\n"))
        run(GenerateConfig(chat=True, max_new_tokens=5, output=str(output)), workdir)
        first, second = records(output)
        asked = [{"role": "user", "content": "hi"}]
        assert first["prompt"] == asked
        answered = [{"role": "assistant", "content": first["completion"]}, {"role": "user", "content": "and then?"}]
        assert second["prompt"] == asked + answered

    def test_a_long_conversation_forgets_its_beginning(self, workdir, capsys):
        dialogue = Dialogue(Generator.from_checkpoint(workdir), max_new_tokens=8)
        seen = []
        for turn in range(12):
            seen.append(dialogue.say(Prompt(f"question {turn}", "line")).content)
            dialogue.hear(f"answer {turn}")
        assert seen[0] == [{"role": "user", "content": "question 0"}]
        last = seen[-1]
        assert 1 < len(last) < 23
        assert last[0] == {"role": "user", "content": f"question {12 - (len(last) + 1) // 2}"}
        assert last[-1] == {"role": "user", "content": "question 11"}
        assert "forgotten to make room: the oldest 1 questions" in capsys.readouterr().err

    def test_a_prompt_that_never_fits_is_refused(self, workdir, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO("the quick brown fox " * 60 + "\n"))
        with pytest.raises(ConfigError, match=r"together more than the model's max_position_embeddings = 128"):
            run(GenerateConfig(chat=True, max_new_tokens=5), workdir)

    def test_runs(self, workdir, capsys):
        run(GenerateConfig(prompts="hi", chat=True, max_new_tokens=5), workdir)
        assert "1 prompts" in capsys.readouterr().err


def test_sequences_are_printed_in_order_as_soon_as_possible():
    out = io.StringIO()
    printer = Printer([Prompt("A:", "0"), Prompt("B:", "1")], first_index=4, echo=True, file=out)
    shown = []
    for piece in [
        Piece(5, "b1", (1,), None),
        Piece(4, "a1", (1,), None),
        Piece(5, "b2", (1,), "eos"),
        Piece(4, "a2", (1,), "length"),
    ]:
        printer.show(piece)
        shown.append(out.getvalue())
    assert shown == ["A:", "A:a1", "A:a1", "A:a1a2\nB:b1b2\n"]


class TestBadInput:
    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            run(GenerateConfig(prompts="x"), tmp_path)

    def test_a_tokenizer_that_does_not_fit(self, workdir, tmp_path):
        other = write_run(tmp_path / "other", vocab_size=100)
        with pytest.raises(InputError, match="tokenizer has 290 tokens and the model's vocab_size is 100"):
            run(GenerateConfig(prompts="x"), other)

    def test_output_cannot_be_written(self, workdir, tmp_path):
        with pytest.raises(ConfigError, match=r"GenerateConfig.output = .*No such file or directory"):
            run(GenerateConfig(prompts="x", output=str(tmp_path / "no" / "out.jsonl")), workdir)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"prompts": "a", "prompts_file": "b.txt"}, "prompts are given too"),
            ({"prompts_file": "b.csv"}, r"must be a .jsonl or a .txt file"),
            ({"stop": ("",)}, "cannot be empty"),
            ({"max_new_tokens": 0}, "GenerateConfig.max_new_tokens = 0"),
        ],
    )
    def test_impossible_configs(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            GenerateConfig(**fields)

    def test_a_prompt_that_is_too_long_is_not_printed(self, workdir, capsys):
        with pytest.raises(ConfigError, match="max_new_tokens = 200"):
            run(GenerateConfig(prompts="the fox", max_new_tokens=200), workdir)
        assert capsys.readouterr().out == ""

    def test_exit_codes(self, tmp_path, capsys):
        assert main(["generate", f"--workdir={tmp_path}", "--gin.PROMPTS=x"]) == exit_codes.BAD_INPUT
        assert "holds no checkpoint" in capsys.readouterr().err
        assert main(["generate", f"--workdir={tmp_path}", "--gin.TOP_P=2.0"]) == exit_codes.BAD_CONFIG
        assert "SamplingConfig.top_p = 2.0" in capsys.readouterr().err
