"""The preflight finds, in seconds and without a device, what would end a job."""

import http.server
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from pipeline import cli
from pipeline.config.choices import WandbMode
from pipeline.config.operation import TrackingConfig
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import derive
from pipeline.distributed.ranks import Ranks
from pipeline.errors import ConfigError, DataError, MachineError
from pipeline.planning import devices
from pipeline.preflight import PreflightConfig, main, missing_devices, wandb_warnings
from pipeline.resilience import failure
from pipeline.training import run_metrics, startup
from tests.support.slurm_cluster import REPO
from tests.support.token_dataset import write_dataset
from tests.support.waiting import HANG_S


@pytest.fixture
def settings(tmp_path):
    for split in ("train", "validation"):
        write_dataset(
            tmp_path / "data" / split, [np.arange(4096) % 64, np.arange(512) % 61], vocab_size=64
        )
    return [
        f"data.path={tmp_path / 'data'}",
        f"runs_dir={tmp_path / 'runs'}",
        "name=a",
        "world_size=4",
    ]


def problems(settings: list[str]) -> str:
    with pytest.raises(MachineError) as caught:
        main(cli.compose(PreflightConfig, settings, config="pretrain"))
    return str(caught.value)


def test_a_run_that_would_start_prints_its_folder_and_imports_no_torch(settings, tmp_path):
    program = (
        "import sys; from pipeline import cli, preflight\n"
        "preflight.main(cli.compose(preflight.PreflightConfig, sys.argv[1:], config='pretrain'))\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, *settings, "parallel.tensor_parallel_size=2"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=HANG_S)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'runs' / 'a'}\n"), done.stderr
    assert "4 ranks = 2 data x 1 pipeline x 2 tensor parallel" in done.stderr
    assert "a rank holds about" in done.stderr


def test_a_stage_that_would_train_nothing_is_found_without_a_device(settings):
    """Its optimizer would raise, and the other stages wait for it for ever: no group may form."""
    words = ["finetune=last-layers", "checkpoint.init_from=nowhere", "model=tiny"]
    words += ["model.tied_embeddings=false", "parallel.pipeline_parallel_size=2"]
    said = problems([*settings, *words])
    assert "names nothing on stage 0 of 2 pipeline stages" in said
    assert "Set parallel.pipeline_parallel_size=1" in said


def test_the_place_of_a_fallback_is_printed_before_the_run_folder(settings, tmp_path, capsys):
    """launch/pretrain.slurm requeues by progress, wherever it is saved."""
    fallback = f"checkpoint.fallback_dir={tmp_path / 'other'}"
    main(cli.compose(PreflightConfig, [*settings, fallback], config="pretrain"))
    assert capsys.readouterr().out == f"{tmp_path / 'other' / 'a'}\n{tmp_path / 'runs' / 'a'}\n"


def test_shards_only_says_which_shard_shrank_and_nothing_else(settings, tmp_path, capsys):
    """What launch scripts ask after a rank was killed; here with settings that no run could have."""
    cfg = cli.compose(
        PreflightConfig, [*settings, "shards_only=true", "world_size=3"], config="pretrain"
    )
    main(cfg)
    assert capsys.readouterr() == ("", "")
    shard = next((tmp_path / "data" / "train").glob("shards/*/*.tar"))
    os.truncate(shard, 1000)
    with pytest.raises(
        DataError, match=rf"1 of 2 shards .*{shard.name} \(1000 bytes.*(?s:.*)SIGBUS"
    ):
        main(cfg)


def test_all_problems_are_named_at_once(settings, tmp_path):
    shard = next((tmp_path / "data" / "train").glob("shards/*/*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    wrong = ["parallel.pipeline_parallel_size=3", "schedule.min_lr=1", "model.hidden_size=33"]
    found = problems([*settings, *wrong])
    assert "schedule.min_lr (1.0)" in found and "model.hidden_size (33)" in found
    assert "the number of ranks (4) must be a multiple" in found
    assert "1 of 2 shards are missing or truncated, first shards/00000/tok-00000000.tar" in found


def test_a_folder_that_cannot_be_written_is_named(settings, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert "cannot be written" in problems(settings)


def test_a_node_with_fewer_gpus_than_ranks_is_named(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "100")
    assert list(missing_devices(PretrainConfig())) == []
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "100")
    (found,) = missing_devices(PretrainConfig())
    assert "GPUs for 100 ranks" in found and "--exclude=" in found
    monkeypatch.delenv(
        "SLURM_NTASKS_PER_NODE"
    )  # then launch/pretrain.slurm starts one rank per GPU
    assert list(missing_devices(PretrainConfig())) == [found]


def test_wandb_is_asked_for_only_when_online(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    online = TrackingConfig(wandb=WandbMode.online)
    assert list(wandb_warnings(online)) == []
    server.shutdown()
    server.server_close()
    (warning,) = wandb_warnings(online)
    assert "is not reached" in warning and "wandb sync" in warning
    assert list(wandb_warnings(TrackingConfig(wandb=WandbMode.auto))) == []  # no key: offline
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert len(list(wandb_warnings(TrackingConfig(wandb=WandbMode.auto)))) == 1


class OutOfMemoryError(RuntimeError):
    """Stands in for torch's, by name."""


def test_out_of_memory_prints_the_breakdown_and_the_settings_that_help(settings, capfd, tmp_path):
    words = [word for word in settings if "world_size" not in word]
    cfg = cli.compose(PretrainConfig, [*words, "training.micro_batch_size=8"], config="pretrain")
    ranks = Ranks(3, 4, 3, 4, "n1")
    advice = startup.memory_advice(cfg, ranks)
    code = failure.report(
        OutOfMemoryError("CUDA out of memory."),
        ranks=ranks,
        run_dir=tmp_path,
        step=0,
        advice=advice,
    )
    printed = capfd.readouterr().err
    assert code == 1 and printed.startswith(
        "error: rank 3 on n1 after step 0: OutOfMemoryError: CUDA out of memory."
    )
    assert (
        "weights" in printed
        and "activations" in printed
        and "  training.micro_batch_size=1: " in printed
    )


def test_a_broken_device_file_costs_neither_a_run_nor_the_report_of_its_failure(
    settings, monkeypatch
):
    """It ended the run at its start, and its error took the place of the one to be reported."""

    def broken():
        raise ConfigError("conf/devices/ours.yaml is not yaml")

    monkeypatch.setattr(devices, "device_here", broken)
    monkeypatch.setattr(run_metrics, "device_here", broken)
    words = [word for word in settings if "world_size" not in word]
    cfg = cli.compose(PretrainConfig, words, config="pretrain")
    assert startup.memory_advice(cfg, Ranks(0, 4, 0, 4, "n1")) == ""
    shape = derive(cfg, world_size=4, tokenizer_vocab_size=64)
    assert run_metrics._plan(cfg, shape) is None


def test_a_held_out_set_without_a_label_is_found_before_the_first_step(settings, tmp_path):
    """It used to end the run at the first evaluation, with the steps until then unsaved."""
    write_dataset(tmp_path / "tiny" / "validation", [np.array([5])], vocab_size=64)
    tiny = f"data.validation=[{{path: {tmp_path}/tiny/validation}}]"
    found = problems([*settings, f"data.train=[{{path: {tmp_path}/data/train}}]", tiny])
    assert "dataset validation" in found and "has nothing to predict: 1 shards, 1 tokens" in found
    assert "validation_fraction" in found and "data.validation=[]" in found


def test_a_held_out_shard_that_is_lost_is_found_before_the_first_step(settings, tmp_path):
    """Also without preflight: it ended the run at its first evaluation."""
    next((tmp_path / "data" / "validation").glob("shards/*/*.tar")).unlink()
    cfg = cli.compose(PreflightConfig, settings, config="pretrain")
    with pytest.raises(DataError, match=r"validation: 1 of 2 shards are missing.*-1 bytes"):
        startup.check(cfg, world_size=4)
    assert problems(settings).count("shards are missing") == 1
    startup.check(
        cli.compose(PreflightConfig, [*settings, "data.validation=[]"], config="pretrain"),
        world_size=4,
    )


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "long", [np.arange(4096) % 64], vocab_size=64)
    write_dataset(folder / "code", [np.arange(4096) % 63], vocab_size=64)
    write_dataset(folder / "short", [np.arange(40) % 61], vocab_size=64)
    return folder


@pytest.mark.parametrize(
    "train, more, message",
    [
        ("{path: D/long, weight: -1}", [], "weights must not be negative and not all 0"),
        ("{path: D/long, weight: inf}", [], "their sum a finite number: .*inf"),
        ("{path: D/long, weight: nan}, {path: D/code, weight: 1}", [], "their sum a finite number"),
        ("{path: D/long, weight: 1e308}, {path: D/code, weight: 1e308}", [], "a finite number"),
        (
            "{path: D/long, weight: 1}, {path: D/code, weight: 2}",
            ["data.blend_schedule=[{start_step: 5, weights: {long: nan, code: 1}}]"],
            "blend_schedule.0.: weights must not be negative",
        ),
        ("{path: D/long}", ["data.temperature=nan"], r"data.temperature \(nan\) must be above 0"),
        ("{path: D/long}, {path: D/code}", ["data.temperature=1e-4"], "no weight is left"),
        ("{path: D/long, max_epochs: nan}", [], r"max_epochs \(nan\) of dataset long must be"),
        ("{path: D/long, max_epochs: inf}", [], r"max_epochs \(inf\) of dataset long must be"),
        ("{path: D/long, max_epochs: -1}", [], r"max_epochs \(-1.0\) of dataset long must be"),
        ("{path: D/long}", ["data.cache_size_gib=nan"], r"data.cache_size_gib \(nan\) must be"),
        (
            "{path: D/long}",
            ["data.validation=[{path: D/code, max_epochs: 2}]"],
            r"data.validation\[0\].max_epochs \(2.0\) has no effect",
        ),
        ("{path: D/long, weight: 1}, {path: D/code}", [], "code has none"),
        (
            "{path: D/long}",
            ["data.blend_schedule=[{start_step: 5, weights: {web: 1}}]"],
            "names web",
        ),
        (
            "{path: D/short}",
            [],
            "short .* has no sequence of 257 tokens: its longest shard has 40",
        ),
        ("{path: D/long, max_epochs: 1}", ["training.total_steps=100"], "used up at sample 15"),
    ],
)
def test_what_the_loader_would_refuse_is_refused_before(datasets, tmp_path, train, more, message):
    """From settings and manifests alone: a job does not wait in a queue to learn of a weight."""
    words = [f"data.train=[{train}]", "data.validation=[]", *more]
    words = [word.replace("D/", f"{datasets}/") for word in words]
    with pytest.raises(MachineError, match=message):
        settings = [*words, f"runs_dir={tmp_path}", "name=a"]
        main(cli.compose(PreflightConfig, settings, config="pretrain"))


def test_the_passes_over_each_dataset_are_said_and_many_are_warned_of(datasets, tmp_path, capsys):
    words = [
        f"data.train=[{{path: {datasets}/long}}]",
        "data.validation=[]",
        f"runs_dir={tmp_path}",
    ]
    words += ["name=a", "training.global_batch_size=4", "schedule.warmup_steps=0"]
    main(cli.compose(PreflightConfig, [*words, "training.total_steps=15"], config="pretrain"))
    printed = capsys.readouterr().err
    assert "the run reads 4.00 epochs of long" in printed and "warning" not in printed
    main(cli.compose(PreflightConfig, [*words, "training.total_steps=20"], config="pretrain"))
    assert "dataset long will be read 5.3 times" in capsys.readouterr().err
