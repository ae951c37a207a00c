"""runs.py, loop.py: what a run survives. Kills, torn and hostile checkpoints, full disks, signals, bad files, other
splits.
"""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, SMALL, Job, command, environment, here, log, make_images, run, slow
from PIL import Image
from test_data import bad_files, picture

import finetune
import show
import train
from engine import checkpoints, runs
from engine.dist import Distributed
from engine.errors import UserError

LAUNCH = Distributed(torch.device("cpu"))


def arguments(tmp_path, out="out", **changes):
    settings = {
        "data": tmp_path / "data",
        "recipe": "cifar",
        "epochs": 3,
        "warmup-epochs": 1,
        "batch-size": 8,
        "log-every": 2,
        "checkpoint-every-steps": 2,
        "output": tmp_path / out,
        "eval-images": 4,
    } | {k.replace("_", "-"): v for k, v in changes.items()}
    return [*SMALL, *(word for name, value in settings.items() if value is not None for word in (f"--{name}", value))]


def kill_test(folder, kills, processes=1):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "kills.py"),
            str(folder),
            "--kills",
            str(kills),
            "--processes",
            str(processes),
        ],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{kills} kills" in done.stdout and done.stdout.count("identical: True") == 2, done.stdout


def test_two_kills_leave_no_trace(tmp_path):
    """At any moment, and in the middle of a checkpoint's write."""
    kill_test(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills, processes", [(20, 1), (10, 2)])
def test_many_kills_leave_no_trace(tmp_path, kills, processes):
    kill_test(tmp_path, kills, processes)


def test_a_run_may_go_on_with_another_split_of_the_same_batch(tmp_path):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, "whole"))
    here(train.main, *arguments(tmp_path, max_steps=4))
    run("train.py", *arguments(tmp_path, batch_size=2, accumulate=2, resume="auto", workers=1), processes=2)
    for a, b in zip(log(tmp_path / "whole"), log(tmp_path / "out"), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name in a.keys() & {"loss", "eval_error", "lr"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"mask_ratio": 0.5}, "--mask-ratio was 0.75, is 0.5"),
        ({"seed": 1}, "--seed was 0, is 1"),
        ({"batch_size": 4}, "must stay equal"),
        ({"epochs": 4}, "--epochs was 3, is 4"),
    ],
)
def test_a_resumed_run_keeps_its_settings(tmp_path, change, word):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, max_steps=1))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    with pytest.raises(UserError, match=word):
        train.main([str(x) for x in arguments(tmp_path, resume="auto", **change)])
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}


def test_a_resumed_run_keeps_its_arithmetic(tmp_path):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, max_steps=1))
    saved = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    saved["config"]["precision"] = "torch.bfloat16 on cuda"  # as a run on a GPU, begun with the same flags, would say
    torch.save(saved, tmp_path / "out" / "last.pt")
    with pytest.raises(UserError, match="was torch.bfloat16 on cuda, is torch.float32 on cpu"):
        train.main([str(x) for x in arguments(tmp_path, resume="auto")])


def test_a_run_that_goes_on_with_later_code_says_so(tmp_path, capsys):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, max_steps=1))
    saved = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    saved["config"]["commit"] = "before"
    del saved["config"]["arguments"]["view_angle"]  # as if that flag had come since
    torch.save(saved, tmp_path / "out" / "last.pt")
    assert show.model_from(saved, "last.pt").sources == 2
    for _ in range(2):
        here(train.main, *arguments(tmp_path, resume="auto", max_steps=2))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["earlier_commits"] == ["before"]
    assert capsys.readouterr().out.count("another commit: before before") == 1


def test_a_checkpoint_of_code_with_other_parameters_is_refused(tmp_path):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, max_steps=1))
    saved = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    saved["optimizer"]["param_groups"][0]["names"].reverse()  # would give each parameter another's moments
    torch.save(saved, tmp_path / "out" / "last.pt")
    with pytest.raises(UserError, match="had other parameters"):
        train.main([str(word) for word in arguments(tmp_path, resume="auto", max_steps=2)])


def test_a_torn_checkpoint_is_passed_over_and_a_torn_log_line_removed(tmp_path, capsys):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, "whole"))
    here(train.main, *arguments(tmp_path, max_steps=4))
    last = tmp_path / "out" / "last.pt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    last.write_bytes(data)
    with open(tmp_path / "out" / "log.jsonl", "a") as file:
        file.write('{"step": 5, "los')
    capsys.readouterr()
    here(train.main, *arguments(tmp_path, resume="auto"))
    assert "is not valid" in capsys.readouterr().err
    assert log(tmp_path / "out") == log(tmp_path / "whole")
    (tmp_path / "flipped.pt").write_bytes(data)
    with pytest.raises(UserError, match="flipped.pt: not a valid checkpoint"):  # refused when it is named
        finetune.main(["--data", str(tmp_path / "data"), "--checkpoint", str(tmp_path / "flipped.pt")])
    assert not checkpoints.find_corruption(last) and checkpoints.find_corruption(tmp_path / "out" / "log.jsonl")
    last.write_bytes(bytes(data[:1000]))
    assert checkpoints.newest_valid(tmp_path / "out").name == "previous.pt"


def test_resume_auto_without_a_checkpoint_starts_afresh(tmp_path):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, resume="auto", max_steps=2))
    first = log(tmp_path / "out")
    (tmp_path / "out" / "last.pt").unlink()  # as of a run that died before its first checkpoint
    (tmp_path / "out" / "new.pt.tmp").write_bytes(b"half of one")
    here(train.main, *arguments(tmp_path, resume="auto", max_steps=2))
    assert [row["step"] for row in first] == [2, 2] and log(tmp_path / "out") == first


def test_a_file_that_vanishes_shifts_nothing(tmp_path):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, max_steps=2, epochs=8))
    gone = (tmp_path / "out" / "files.txt").read_text().split("\n")[3]
    (tmp_path / "data" / gone).unlink()
    here(train.main, *arguments(tmp_path, resume="auto", max_bad_share=0.5, epochs=8))
    assert (tmp_path / "out" / "bad_files.txt").read_text() == f"{gone}\tno such file\n"
    assert log(tmp_path / "out")[-2]["bad_files"] == 1


@pytest.mark.parametrize("name", slow(["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"], fast=["SIGINT"]))
def test_signals_stop_after_a_step_and_the_run_goes_on(tmp_path, name):
    make_images(tmp_path / "data", each=40)
    here(train.main, *arguments(tmp_path, "whole", checkpoint_every_steps=None))
    job = Job("train.py", *arguments(tmp_path, checkpoint_every_steps=None, log_every=1))
    path, deadline = tmp_path / "out" / "log.jsonl", time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(getattr(signal, name))
    done = job.wait()
    assert done.returncode == runs.STOPPED and f"continue with --resume {tmp_path / 'out'}" in done.stdout
    stopped_at = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"]
    assert 2 <= stopped_at < 27 and [row["step"] for row in log(tmp_path / "out") if "loss" in row][-1] == stopped_at
    here(train.main, *arguments(tmp_path, checkpoint_every_steps=None, resume="auto", log_every=2))
    assert log(tmp_path / "out")[-1] == log(tmp_path / "whole")[-1]


def test_a_full_disk_costs_a_warning_until_the_last_checkpoint(tmp_path, capfd):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, max_steps=2))
    capfd.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # no file may grow past 1 MB: checkpoints do not fit, the log does
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
        with pytest.raises(
            UserError, match="checkpoint of step 6 could not be written.* newest valid checkpoint is of step 2"
        ):
            train.main([str(word) for word in arguments(tmp_path, resume="auto")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capfd.readouterr()
    assert "the checkpoint of step 4 was not written" in printed.err and "next: python finetune.py" not in printed.out
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 2 and not list(
        (tmp_path / "out").glob("*.tmp")
    )
    assert log(tmp_path / "out")[-1]["step"] == 6
    here(train.main, *arguments(tmp_path, resume="auto"))
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 6


def test_log_lines_that_a_full_disk_refuses_come_later(tmp_path, capfd):
    (tmp_path / "out").mkdir()
    target, limits = runs.Run(tmp_path / "out", LAUNCH), resource.getrlimit(resource.RLIMIT_FSIZE)
    target.log(step=1, loss=float("nan"))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        target.log(step=2, loss=1.0, padding="x" * 6000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "not written" in capfd.readouterr().err and [row["step"] for row in log(tmp_path / "out")] == [1]
    target.log(step=3, loss=1.0)
    assert [row["step"] for row in log(tmp_path / "out")] == [1, 2, 3] and log(tmp_path / "out")[0]["loss"] is None


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path):
    for name, write in (
        ("zip.pt", lambda path: torch.save({"model": Evil(tmp_path / "owned")}, path)),
        ("plain.pt", lambda path: path.write_bytes(pickle.dumps({"model": Evil(tmp_path / "owned")}))),
    ):
        write(tmp_path / name)
        with pytest.raises(UserError, match="refused|not a valid checkpoint") as caught:
            checkpoints.load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
        done = run("show.py", "a.jpg", "b.jpg", "--checkpoint", tmp_path / name, status=2)
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "owned").exists()
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoints.load_checkpoint(tmp_path / "text.pt")


def test_nothing_loads_unsafely():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py")]:
        text = path.read_text()
        assert (
            "pickle.load" not in text
            and "weights_only=" + "False" not in text
            and " exec(" not in text
            and " eval(" not in text
        )
        assert text.count("torch.load(") == text.count("weights_only=True)"), path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_among_good_ones(tmp_path, workers):
    (tmp_path / "data").mkdir()
    bad = bad_files(tmp_path / "data")
    picture(64, 48).save(tmp_path / "data" / "really_png.jpg", "PNG")
    picture(64, 48).quantize(8).save(
        tmp_path / "data" / "animated.gif", save_all=True, append_images=[Image.new("P", (64, 48))]
    )
    for k in range(50):
        picture(40, 30).save(tmp_path / "data" / f"good{k}.jpg")
    here(train.main, *arguments(tmp_path, max_bad_share=0.5, workers=workers, batch_size=16))
    reported = dict(line.split("\t") for line in (tmp_path / "out" / "bad_files.txt").read_text().splitlines())
    listed = set((tmp_path / "out" / "files.txt").read_text().split("\n"))
    assert set(reported) == set(bad) & listed and len(reported) >= 10
    assert log(tmp_path / "out")[-2]["bad_files"] == len(reported)
    with pytest.raises(UserError, match=r"files cannot be read, more than --max-bad-share 0.05"):
        train.main([str(x) for x in arguments(tmp_path, "strict", workers=workers, batch_size=16)])


def test_leaving_waits_for_a_checkpoint_and_for_no_other_thread(tmp_path):
    (tmp_path / "script.py").write_text("""import concurrent.futures, pathlib, threading, time
from engine.dist import hard_exit
pool = concurrent.futures.ThreadPoolExecutor(1)  # such as torch.compile leaves behind, waiting for work for ever
pool.submit(int)
threading.Thread(target=lambda: (time.sleep(0.5), pathlib.Path("written").touch()), name="checkpoint").start()
hard_exit(2)""")
    run(tmp_path / "script.py", cwd=tmp_path, status=2)
    assert (tmp_path / "written").exists()


def test_minutes_between_checkpoints(monkeypatch):
    signals = runs.StopSignals(LAUNCH, 5)
    now = time.monotonic()
    monkeypatch.setattr(runs.time, "monotonic", lambda: now + 299)
    assert signals.all_reduce_requests() == (False, False)
    monkeypatch.setattr(runs.time, "monotonic", lambda: now + 301)
    assert signals.all_reduce_requests() == (False, True) and signals.all_reduce_requests() == (False, False)


def test_a_whole_checkpoint_is_not_deleted_for_an_older_one(tmp_path):
    make_images(tmp_path / "data")
    here(train.main, *arguments(tmp_path, max_steps=4))
    last = (tmp_path / "out" / "last.pt").read_bytes()
    here(
        train.main, *arguments(tmp_path, output=None, resume=tmp_path / "out" / "previous.pt", max_steps=2)
    )  # where it stands: no new save
    assert (tmp_path / "out" / "last.pt").read_bytes() == last


def test_runs_that_begin_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"resume": None, "output": None}
    both = [runs.open_run(settings, LAUNCH, "cifar", "eesmm")[0] for _ in range(2)]
    for run_ in both:
        runs.create_folder(run_, {}, {}, is_new=True)
    assert [str(run_.folder) for run_ in both] == [f"runs/cifar-eesmm-{k}" for k in (1, 2)]
    assert (
        all((folder / "config.json").exists() for folder in tmp_path.glob("runs/*"))
        and both[1].checkpoints.folder == both[1].folder
    )


def test_a_bad_file_need_not_have_a_utf_8_name(tmp_path):
    make_images(tmp_path / "data")
    name = os.path.join(os.fsencode(tmp_path), b"data", b"class0", b"caf\xe9.jpg")
    with open(name, "wb") as file:
        file.write(b"no image")
    done = run("train.py", *arguments(tmp_path, max_bad_share=0.9))
    assert "caf\\udce9.jpg" in done.stderr and b"caf\xe9.jpg" in (tmp_path / "out" / "bad_files.txt").read_bytes()


def test_a_class_that_came_later_is_refused(tmp_path):
    make_images(tmp_path / "data")
    common = [
        "--data",
        tmp_path / "data",
        "--init",
        "scratch",
        *(word for word in SMALL if word not in ("--decoder-width", "32")),
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--output",
        tmp_path / "out",
    ]
    here(finetune.main, *common, "--max-steps", "1")
    make_images(tmp_path / "data", classes=3)
    with pytest.raises(UserError, match=r"the classes of --data changed \(2, now 3\)"):
        finetune.main([str(word) for word in (*common, "--resume", "auto")])


@pytest.mark.slow
def test_a_worker_that_dies_is_restarted_by_torchrun(tmp_path):
    # the variable, as in the README's launch line: without it the new processes meet the addresses of the dead in
    # torchrun's store
    make_images(tmp_path / "data", each=40)
    here(train.main, *arguments(tmp_path, "whole", batch_size=4, accumulate=2))
    distributed = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=3",
        str(ROOT / "train.py"),
        *map(str, arguments(tmp_path, batch_size=2, accumulate=2, resume="auto")),
    ]
    process = subprocess.Popen(
        distributed,
        env=environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path, deadline = tmp_path / "out" / "last.pt", time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(timeout=240) == 0
    assert [row["step"] for row in log(tmp_path / "out")] == [row["step"] for row in log(tmp_path / "whole")]


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step(tmp_path):
    make_images(tmp_path / "data", each=40)
    common = dict(batch_size=2, accumulate=2, checkpoint_every_steps=None, log_every=1)
    run("train.py", *arguments(tmp_path, "whole", **common), processes=2, real=True)
    process = subprocess.Popen(
        command("train.py", *arguments(tmp_path, **common), processes=2),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    path, deadline = tmp_path / "out" / "log.jsonl", time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to both
    assert "stopped by a signal after step" in process.communicate(timeout=60)[0]
    stopped_at = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"]
    assert 3 <= stopped_at < 27
    run("train.py", *arguments(tmp_path, resume="auto", **common), processes=2, real=True)
    assert log(tmp_path / "out") == log(tmp_path / "whole")


@pytest.mark.slow
def test_two_nodes_on_one_machine(tmp_path):
    make_images(tmp_path / "data")
    common = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=127.0.0.1:29511",
        "--rdzv_id=7",
        str(ROOT / "train.py"),
        *map(str, arguments(tmp_path, batch_size=4)),
    ]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *common],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [node.wait(timeout=240) for node in nodes] == [0, 0], [node.stderr.read()[-2000:] for node in nodes]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["processes"] == 2 and log(tmp_path / "out")[-1]["step"] == 6


@pytest.mark.parametrize(
    "method, program",
    slow(
        [(method, program) for method in ("spawn", "forkserver") for program in ("train", "finetune")],
        fast=[("forkserver", "train")],
    ),
)
def test_loader_workers_start_by_any_method(tmp_path, method, program):
    """Forkserver is the default from Python 3.14 on. Same batches as without workers, RandAugment included."""
    make_images(tmp_path / "data")
    (tmp_path / "script.py").write_text(f"""import multiprocessing, sys
sys.path.insert(0, {str(ROOT)!r})
import {program} as program
from engine.dist import run_main
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r}, force=True)
    run_main(program.main)
""")
    words = [
        word
        for word in arguments(tmp_path, "plain", max_steps=2, epochs=1, decoder_width=None)
        if word not in ("--decoder-width", "32")
    ]
    words = (
        words
        if program == "train"
        else [
            *(word for k, word in enumerate(words) if "--eval-images" not in (word, words[k - 1])),
            "--init",
            "scratch",
        ]
    )
    here({"train": train, "finetune": finetune}[program].main, *words)
    words[words.index(tmp_path / "plain")] = tmp_path / "out"
    words[words.index("--workers") + 1] = 2
    run(tmp_path / "script.py", *words, cwd=tmp_path)
    assert log(tmp_path / "plain") == log(tmp_path / "out")
