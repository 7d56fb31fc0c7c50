"""What this machine is, and what a program took of it: time, memory, and how much others took meanwhile."""

import os
import pathlib
import subprocess
import sys
import time

TICKS = os.sysconf("SC_CLK_TCK")


def processor():
    """The processor's name, how many there are, and the instructions that products in bf16 can use."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    fields = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
    name = next((value for key, value in fields if key == "model name"), os.uname().machine)
    flags = next((set(value.split()) for key, value in fields if key in ("flags", "Features")), set())
    has = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16", "asimd") if flag in flags]
    return f"{os.cpu_count()} x {name} ({', '.join(has)})"


def busy_seconds():
    """CPU seconds that all programs have taken since the machine started."""
    values = [int(value) for value in pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle, waiting = values[3:5]
    return (sum(values) - idle - waiting) / TICKS


def run(command, threads, cwd=None):
    """Runs a program to its end: its stdout, its peak memory in bytes over its whole life (loading included), and the share of the
    machine that others took meanwhile. Ends with the program's own words if it fails."""
    environment = dict(os.environ, RAYON_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    # stderr goes to a file: a pipe that nobody reads may fill.
    log = pathlib.Path(cwd or ".") / "stderr.txt"
    begun, busy = time.monotonic(), busy_seconds()
    with log.open("w") as stderr:
        process = subprocess.Popen([str(word) for word in command], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - begun
    own = usage.ru_utime + usage.ru_stime
    if process.returncode:
        sys.exit(f"{log.read_text()[-3000:]}\n{' '.join(map(str, command))}: ended with {process.returncode}")
    others = max(0.0, busy_seconds() - busy - own) / (wall * os.cpu_count())
    return out, dict(peak_bytes=usage.ru_maxrss * 1024, wall_s=wall, cpu_s=own, others=others)
