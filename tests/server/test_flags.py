"""The command line: every setting has a flag, presets complete a pair, mistakes get a hint."""

import json
import re
from pathlib import Path

import pytest

from eaglerun import configs
from eaglerun.config import Config, options, resolve
from eaglerun.errors import ConfigError
from eaglerun.llm import LLM
from eaglerun.server import cli
from eaglerun.server.flags import Parser, add_settings, config_of, parse_flags


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch):
    for option in options():
        monkeypatch.delenv(f"EAGLERUN_{option.name.upper()}", raising=False)


def parsed(*argv: str) -> tuple[Config, str | None]:
    parser = Parser(allow_abbrev=False)
    add_settings(parser)
    return config_of(parse_flags(parser, argv))


def test_nothing_means_the_demo_pair():
    config, preset = parsed()
    assert (config.model.model, config.model.draft, preset) == ("demo", "demo", None)
    assert parsed("demo")[0] == config
    assert parsed("--draft", "none")[0].model.draft is None


def test_every_setting_has_its_flags():
    parser = Parser(allow_abbrev=False)
    add_settings(parser)
    text = parser.format_help()
    for option in options():
        assert all(flag in text for flag in option.flags)


def test_words_of_a_flag_are_joined_by_either_sign():
    config, _ = parsed(
        "m", "--max_num_seqs", "7", "--max-model-len=99", "--no_enable-prefix_caching"
    )
    assert config.scheduling.max_num_seqs == 7
    assert config.model.max_model_len == 99
    assert not config.cache.enable_prefix_caching
    # A value keeps its underscores.
    assert parsed("--chat_template=a_b.jinja")[0].server.chat_template == "a_b.jinja"


def test_names_that_others_use():
    config, _ = parsed("m", "--spec-model", "d", "--num-speculative-tokens", "2", "--port", "81")
    assert config.model.draft == "d"
    assert config.num_draft_tokens == 2
    assert config.server.http_port == 81
    for flags in (("-tp", "4"), ("-tp=4",), ("--tp_size=4",), ("--tensor-parallel-size", "4")):
        assert parsed("m", *flags)[0].model.tensor_parallel_size == 4


def test_speculative_config_as_in_vllm():
    text = '{"model": "d", "num_speculative_tokens": 5, "method": "eagle3"}'
    config, _ = parsed("m", "--speculative-config", text)
    assert (config.model.draft, config.num_draft_tokens) == ("d", 5)
    for text, words in (
        ("{", "is not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"method": "ngram"}', "method = 'ngram': allowed eagle3"),
        ('{"num_spec_tokens": 3}', "unknown key 'num_spec_tokens'; did you mean 'num_specul"),
        ('{"num_speculative_tokens": "x"}', "num_draft_tokens = 'x': expected int"),
        ('{"model": "e"}', "draft is given twice: 'd', and 'e' by --speculative-config"),
    ):
        with pytest.raises(ConfigError, match=words):
            parsed("m", "--draft", "d", "--speculative-config", text)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-num-seq", "3"], "unknown flag --max-num-seq; did you mean '--max-num-seqs'?"),
        (["--max_nun_seqs=3"], "unknown flag --max-nun-seqs; did you mean '--max-num-seqs'?"),
        (["--pipeline_parallel_size=2"], "--pipeline-parallel-size is not in this build: this bu"),
        (["-tp", "0"], "tensor_parallel_size = 0: allowed at least 1"),
        (["--tp-size", "two"], "tensor_parallel_size = 'two': expected int"),
        (["--kv-cache-dtype", "int8"], "kv_cache_dtype = 'int8': allowed auto, bfloat16, fp8"),
        (["a", "b"], "'b' is one word too many"),
        (["a", "--model", "b"], "model is given twice: 'b', and 'a' by MODEL"),
        (["--max-num-seqs"], "argument --max-num-seqs.*: expected one argument"),
        (["--max-num-seqs", "x"], "max_num_seqs = 'x': expected int"),
        (["--dtype", "int4"], "dtype = 'int4': allowed auto"),
    ],
)
def test_mistakes(argv: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        parsed(*argv)


def test_a_draft_brings_its_target():
    config, preset = parsed("--draft", "Inferact/MiniMax-M3-EAGLE3")
    assert preset == "minimax-m3-eagle3"
    assert config.model.model == "MiniMaxAI/MiniMax-M3"
    assert config.num_draft_tokens == 3
    config, preset = parsed("MiniMaxAI/MiniMax-M3")
    assert (preset, config.model.draft) == ("minimax-m3", None)
    # What is said beats the preset, also by the environment.
    assert (
        parsed("--draft", "Inferact/MiniMax-M3-EAGLE3", "--spec-tokens", "2")[0].num_draft_tokens
        == 2
    )


def test_the_environment_names_a_draft_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EAGLERUN_DRAFT", "Inferact/MiniMax-M3-EAGLE3-GQA")
    config, preset = parsed("--max-num-seqs", "3")
    assert preset == "minimax-m3-eagle3-gqa"
    assert config.scheduling.max_num_seqs == 3


def test_a_draft_without_a_known_target():
    with pytest.raises(ConfigError, match="name it: .*did you mean 'Inferact/MiniMax-M3-EAGLE3'"):
        parsed("--draft", "Inferact/MiniMax-M3-EAGLE")
    assert parsed("mine", "--draft", "d")[1] is None


def test_config_names_a_file_or_a_preset(tmp_path: Path):
    assert parsed("--config", "minimax-m3")[0].model.model == "MiniMaxAI/MiniMax-M3"
    file = tmp_path / "own.toml"
    file.write_text('[model]\nmodel = "MiniMaxAI/MiniMax-M3"\n[server]\nhttp_port = 5\n')
    config, preset = parsed("--config", str(file), "--host", "::1")
    # A file takes the place of the presets.
    assert preset == "own" and config.scheduling.max_num_seqs == Config().scheduling.max_num_seqs
    assert (config.server.http_port, config.server.host) == (5, "::1")
    with pytest.raises(ConfigError, match="no such preset; did you mean 'minimax-m3'?"):
        parsed("--config", "minimax-m4")


def test_every_preset_is_valid_and_found_by_its_pair():
    pairs = {}
    for file in configs.presets():
        model = resolve(None, file, {}).model
        pairs[file.stem] = (model.model, model.draft)
    assert len(set(pairs.values())) == len(pairs)
    for name, (target, draft) in pairs.items():
        assert parsed(target, *(["--draft", draft] if draft else []))[1] == name


def test_the_command_line_ends_in_words(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["serve", "--max-num-seq", "3"]) == 2
    assert capsys.readouterr().err.startswith("eaglerun: unknown flag --max-num-seq; did you")
    assert cli.main(["server"]) == 2
    assert "invalid choice: 'server'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--num-draft-tokens" in text and "[server]" in text


def test_check_config_tells_what_a_pair_takes(capsys: pytest.CaptureFixture[str]):
    pair = Path(configs.__file__).parent / "m3-8l"
    argv = [str(pair / "target"), "--draft", str(pair / "draft-gqa"), "--dtype", "bfloat16"]
    assert cli.main(["check-config", *argv]) == 0
    text = capsys.readouterr().out
    assert "[scheduling]" in text and "routed experts" in text and "KV memory" in text
    assert cli.main(["check-config", "nowhere/at-all/here"]) == 2
    assert "nowhere/at-all/here" in capsys.readouterr().err
    # Of one rank, nothing else is printed than without the flag; of eight, a rank's part.
    assert cli.main(["check-config", *argv, "-tp", "1"]) == 0
    assert capsys.readouterr().out == text
    assert cli.main(["check-config", *argv, "-tp", "8"]) == 0
    eighth = capsys.readouterr().out
    assert "tensor_parallel_size = 8\n" in eighth
    assert "\n\none rank of 8; each holds as much\n\ntarget, bfloat16" in eighth
    assert f"  routed experts      {36_238_786_560 // 8:>17,}       8.438 GiB\n" in eighth
    assert "  main                         4,096            524,288\n" in eighth
    assert cli.main(["check-config", *argv, "-tp", "3"]) == 2
    assert capsys.readouterr().err.endswith(
        "eaglerun: tensor_parallel_size = 3: target num_attention_heads = 64 cannot be divided "
        "among 3 ranks; allowed 1, 2, 4, 8, 16, 32, 64\n"
    )


@pytest.mark.parametrize("size", [2, 8])
def test_check_config_of_a_rank_of_m3(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The 60 layers of MiniMax-M3: what is printed of a rank adds up, to what it takes by hand."""
    config = json.loads((Path(configs.__file__).parent / "m3-8l/target/config.json").read_text())
    text, sparse = config["text_config"], [0] * 3 + [1] * 57
    text |= {"num_hidden_layers": 60, "moe_layer_freq": sparse}
    for key in ("sparse_attention_freq", "sparse_disable_index_value"):
        text["sparse_attention_config"][key] = sparse
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["check-config", str(tmp_path), "--dtype", "bfloat16"]

    def counts(*more: str) -> dict[str, int]:
        assert cli.main([*argv, *more]) == 0
        table = capsys.readouterr().out.partition("target, bfloat16")[2].partition("KV memory")[0]
        rows = re.findall(r"(?m)^  (\S.*?) +([\d,]+) +[\d,.]+ GiB$", table)
        return {name: int(count.replace(",", "")) for name, count in rows}

    whole, rank = counts(), counts("-tp", str(size))
    assert whole.pop("total") == sum(whole.values()) == 426_174_572_928
    assert rank.pop("total") == sum(rank.values())
    for name in ("embedding", "dense MLP", "routed experts", "shared experts", "lm_head"):
        assert rank[name] * size == whole[name]
    assert (rank["router"], rank["norms"]) == (whole["router"], whole["norms"])
    kv_rows = max(512 // size, 128)
    assert rank["attention"] == 60 * 6144 * (2 * 8192 // size + 2 * kv_rows)
    assert rank["index"] == 57 * 6144 * (kv_rows + 128)


NO_ENGINE = (
    "tensor_parallel_size = 2: allowed 1, as no engine runs on several GPUs yet; "
    "eaglerun check-config -tp 2 tells what each of them would hold"
)


@pytest.mark.parametrize(
    "command",
    [
        *("serve", "chat", "generate", "eval", "lossless", "warm"),
        *("bench latency", "bench throughput", "bench waves", "bench kernels"),
    ],
)
def test_no_command_runs_an_engine_of_several_ranks(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert cli.main([*command.split(), "-tp", "2"]) == 2
    assert capsys.readouterr().err.endswith(f"eaglerun: {NO_ENGINE}\n")
    monkeypatch.setenv("EAGLERUN_TENSOR_PARALLEL_SIZE", "2")
    assert cli.main(command.split()) == 2
    assert capsys.readouterr().err.endswith(f"eaglerun: {NO_ENGINE}\n")


def test_nor_does_python():
    with pytest.raises(ConfigError) as error:
        LLM("demo", tensor_parallel_size=2)
    assert str(error.value) == NO_ENGINE
