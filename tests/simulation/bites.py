"""The simulator finds what it must: `python -m tests.simulation.bites` breaks the product in known ways.

Each patch in `reverts/` takes back something that was mended; each in `mutations/` breaks something else. Each is
applied to a copy of the product, and seeds are run until one fails. Exit code 1: of one patch none has failed, or
a patch does not apply any more. `FOUND` says which seed finds what; it is tried first. What virtual time cannot
show, or what another part of the product makes up for, has a test that fails instead: `SHOWN_BY`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parent.parent
MOST_SEEDS: Final = 2000

FOUND: Final[dict[str, int]] = {
    "reverts/01-order-by-a-table-of-sixteen": 8,
    "reverts/02-an-older-memory-is-replayed": 8,
    "reverts/03-unknown-epochs-are-one": 8,
    "reverts/04-recovered-false-because-of-a-later-gap": 10,
    "reverts/05-recovered-without-since": 11,
    "reverts/06-a-hub-behind-sixteen-epochs": 75,
    "reverts/07-a-connection-is-opened-by-who-waits": 124,
    "reverts/08-without-history-a-lost-connection-is-silent": 27,
    "reverts/11-a-welcome-moves-before-its-gap": 129,
    "reverts/12-hubs-have-no-floor": 398,
    "reverts/13-publishers-have-no-floor": 71,
    "reverts/14-redis-may-stand-before-the-floor": 3,
    "reverts/15-an-epoch-is-named-by-the-clock-alone": 7,
    "reverts/16-a-head-that-went-back-is-taken": 141,
    "reverts/17-a-position-of-a-later-epoch-is-waited-for": 8,
    "reverts/18-other-events-at-known-positions-are-duplicates": 398,
    "reverts/19-what-is-refused-is-of-the-first-epoch": 101,
    "reverts/20-a-gap-in-the-ring-is-told-as-it-is": 11,
    "reverts/21-what-was-forgotten-has-expired": 785,
    "reverts/23-a-page-from-beyond-is-served": 328,
    "reverts/24-a-silent-position-is-forgotten": 142,
    "reverts/25-who-owes-a-reply-may-be-silent": 19,
    "reverts/29-an-id-counts-on-every-channel": 1583,
    "reverts/30-an-error-reply-ends-the-connection": 0,
    "reverts/42-an-epoch-that-never-came-here-is-waited-for": 1003403,
    "reverts/46-who-begins-again-is-told-of-no-history": 1100109,
    "mutations/02-a-page-is-complete-too-soon": 0,
    "mutations/03-a-cached-page-begins-one-too-far": 2,
    "mutations/05-what-has-expired-is-not-told-in-a-replay": 3,
    "mutations/06-the-end-of-the-log-is-no-gap": 0,
    "mutations/07-the-ring-begins-one-too-soon": 0,
    "mutations/08-the-ring-forgets-what-it-has-dropped": 2,
    "mutations/09-a-jump-is-handed-on": 10,
    "mutations/10-a-confirmed-subscription-reads-nothing": 5,
    "mutations/11-offsets-never-go-back": 6,
    "mutations/12-a-restarted-redis-begins-no-epoch": 0,
    "mutations/13-a-subscriber-takes-what-comes-twice": 117,
    "mutations/15-a-subscriber-stays-stale": 0,
    "mutations/17-a-heartbeat-says-where-the-channel-stands": 19,
    "mutations/18-an-event-joins-on-whatever-was-lost": 0,
    "mutations/19-ids-are-forgotten": 3,
    "mutations/20-a-plain-client-is-told-nothing": 1,
    "mutations/21-a-page-of-a-late-replica-is-taken": 5,
    "mutations/22-any-replica-is-one-of-ours": 19,
    "mutations/23-a-page-is-given-beyond-the-head": 343,
    "mutations/24-a-filtered-client-falls-behind-too-far-back": 55,
    "mutations/25-a-subscriber-stays-before-what-came-again": 117,
    "mutations/26-one-is-live-before-it-has-the-last-event": 3,
    "mutations/27-what-is-sent-behind-a-failed-one-is-stored": 449,
    "mutations/28-an-event-of-that-very-instant-is-left-out": 971,
}
"""Per patch a seed that finds it."""

SHOWN_BY: Final[dict[str, tuple[str, str]]] = {
    # Only an earlier hub begins a gap in front of the position that it was asked for.
    "reverts/10-a-gap-begins-before-the-position": ("tests/subscribe/test_resume_state.py", ""),
    # A claim of freshness has to be doubted, and its connection to go half-open, within the same seconds.
    "reverts/09-who-is-stale-pings-once": ("tests/subscribe/test_subscriber.py", "goes_half_open_is_given_up"),
    "reverts/26-slow-is-who-waits-for-the-hub": ("tests/hub/test_replay.py", "waits_for_its_turn_is_not_slow"),
    "reverts/27-a-page-that-cannot-be-read-is-waited-for": (
        "tests/hub/test_verdicts.py",
        "log_that_cannot_be_read",
    ),
    "reverts/28-what-came-early-is-dropped": ("tests/hub/test_sequencer.py", "without_a_pause_do_not_keep"),
    "reverts/31-a-page-of-an-error-is-every-channels": ("tests/hub/test_page_cache.py", "one_channel_that_cannot"),
    # A page has to be cached, or under way, in the moment in which an epoch begins.
    "reverts/22-pages-of-an-earlier-memory-are-served": ("tests/hub/test_page_cache.py", "another_epoch"),
    # More events than the log holds have to come while one page is on its way.
    "reverts/34-a-log-that-has-dropped-both-clears-a-doubt": (
        "tests/hub/test_sequencer.py",
        "log_has_dropped_both",
    ),
    # Redis has to run out of memory between two commands.
    "reverts/35-a-doubt-is-forgotten-before-redis-was-told": (
        "tests/hub/test_sequencer.py",
        "begin_no_epoch_at_first",
    ),
    # The subscription has to be lost in the moment in which the hub finds out that Redis was set back.
    "reverts/36-a-doubt-replaces-every-other-one": ("tests/hub/test_sequencer.py", "else_has_to_be_looked_up"),
    # And the log has to be read in vain, while what comes live joins on to what was handed on before.
    "reverts/37-a-doubt-replaces-the-first-of-its-kind": (
        "tests/hub/test_sequencer.py",
        "lost_again_before_the_log",
    ),
    # An event that is too large has to come at the place of the last one, or be the last one.
    "reverts/38-what-a-hub-refuses-clears-a-doubt": ("tests/hub/test_sequencer.py", "refuses_some_of_the_other"),
    "reverts/39-who-refused-the-last-event-has-no-doubt": ("tests/hub/test_sequencer.py", "had_refused_the_last"),
    # Nobody forges events, or uses another database.
    "reverts/40-events-of-nobody-keep-a-hub-from-catching-up": (
        "tests/hub/test_sequencer.py",
        "do_not_keep_it_from_catching_up",
    ),
    "reverts/41-events-of-nobody-are-kept-as-early": ("tests/hub/test_sequencer.py", "take_no_room"),
    # It has to copy the other master between two rounds of a probe: if one fails, that is told for itself.
    "reverts/32-another-history-is-not-noticed": ("tests/hub/test_replica.py", "another_history"),
    # Events have to leave the log between two of the reads.
    "reverts/44-what-leaves-the-log-while-a-time-is-looked-for-is-untold": (
        "tests/hub/test_times.py",
        "what_leaves_the_log",
    ),
    # A replica that comes back to the same master has all that was published meanwhile.
    "reverts/43-a-replica-that-had-lost-its-master-is-as-before": (
        "tests/faults/test_replicas.py",
        "had_lost_its_master",
    ),
    # Its hub has to prove nothing and to welcome again, or one of several channels to be in trouble alone.
    "reverts/47-a-welcome-is-a-heartbeat": ("tests/subscribe/test_subscriber.py", "welcome_is_no_heartbeat"),
    "reverts/48-any-channel-beats-for-all": ("tests/subscribe/test_subscriber.py", "hears_of_one_of_its_channels"),
    # Publishers of the simulation have more time than their attempts take, and are killed, not closed.
    "reverts/49-deadlines-wait-for-the-attempts-of-others": (
        "tests/publish/test_pipeline.py",
        "deadlines_are_kept",
    ),
    "reverts/50-a-closed-publisher-goes-on-trying": ("tests/publish/test_pipeline.py", "closed_link_makes_no_new"),
    # A cluster.
    "reverts/51-ids-expire-while-a-slot-moves": ("tests/redis/test_stream.py", "while_it_moves_the_slot"),
    # The simulator has no more channels than may be open.
    "reverts/52-a-channel-makes-room-for-its-neighbour": ("tests/hub/test_channels.py", "to_make_room"),
    "reverts/53-a-channel-that-opens-is-a-doubt": ("tests/hub/test_delivery_probe.py", "keep_no_hub_red"),
    "reverts/54-who-waits-for-another-channel-is-slow": ("tests/hub/test_slow.py", "reads_a_long_log"),
    "reverts/55-a-channel-that-cannot-be-read-comes-first": ("tests/hub/test_page_cache.py", "nor_do_channels"),
    "reverts/56-an-earlier-answer-confirms": ("tests/redis/test_pubsub.py", "before_it_was_released"),
    "reverts/57-who-is-ahead-waits-for-ever": ("tests/hub/test_replay.py", "is_ahead_of_a_hub"),
    # As the ones of doubts above.
    "reverts/45-behind-a-gap-no-event-was-the-last-one": (
        "tests/hub/test_sequencer.py",
        "handed_on_last_was_a_gap",
    ),
    # A program has to end between a gap and the event that has shown it.
    "mutations/14-a-subscriber-moves-before-it-gives": ("tests/subscribe/test_subscriber.py", "moves_with_what"),
    "mutations/01-what-is-refused-is-not-told": ("tests/hub/test_sequencer.py", "told_as_refused"),
    "mutations/04-a-page-reaches-one-too-far": ("tests/hub/test_page_cache.py", "all_who_stand_in_it"),
    "mutations/16-heartbeats-without-proof": ("tests/hub/test_beats.py", "has_lost_its_subscription"),
    # Memory has to be set back between two commands that are sent together.
    "reverts/33-a-page-of-another-memory-than-its-head": ("tests/hub/test_page_cache.py", "another_memory"),
}
"""Per patch the file of the tests that fail with it, and words to choose among them."""

_FAILED: Final = re.compile(r"seed (\d+) \([^)]*\): (.*?) \[")


def patches() -> list[Path]:
    """All of them, in order."""
    return [path for folder in ("reverts", "mutations") for path in sorted((HERE / folder).glob("*.patch"))]


def name_of(patch: Path) -> str:
    """Its folder and name, such as `reverts/02-an-older-memory-is-replayed`."""
    return f"{patch.parent.name}/{patch.stem}"


def applies(patch: Path) -> bool:
    """Whether it can be applied to the product as it is."""
    return _apply(patch, ROOT, "--check")


def _apply(patch: Path, folder: Path, *options: str) -> bool:
    # Outside of a repository, or the patch would be looked at as one of its work tree.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *options, str(patch)]
    return subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True).returncode == 0


@contextmanager
def broken(patch: Path) -> Iterator[Path]:
    """A copy of the product and of the simulator with a patch.

    Raises:
        ValueError: It does not apply.
    """
    ignored = shutil.ignore_patterns("__pycache__")
    with tempfile.TemporaryDirectory(prefix="bites-") as temporary:
        folder = Path(temporary)
        for name in ("broadcaster", "tests", "config"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
        if not _apply(patch, folder):
            raise ValueError(f"{name_of(patch)} does not apply any more")
        yield folder


def first_failure(folder: Path, seeds: str, workers: int = 1) -> tuple[int, str] | None:
    """The first of the seeds that fails in a copy, and the rule that is broken; None: none does."""
    command = [sys.executable, "-m", "tests.simulation", seeds, "--until-failure", "--workers", str(workers)]
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    found = _FAILED.match(done.stdout)
    if found is None and done.returncode != 0:
        raise RuntimeError(f"the simulator does not run: {done.stderr[-1000:]}")
    return None if found is None else (int(found[1]), found[2])


def fails(folder: Path, path: str, words: str) -> bool:
    """Whether tests fail in a copy.

    Raises:
        RuntimeError: There are none, or they cannot be run.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path, "-k", words]
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{path} cannot be run: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return done.returncode == 1


def search(patch: Path, most: int, workers: int) -> str | None:
    """What fails with a patch: tests, or a seed and the rule that is broken; None: nothing does.

    Raises:
        ValueError: It does not apply.
    """
    with broken(patch) as folder:
        if name_of(patch) in SHOWN_BY:
            path, words = SHOWN_BY[name_of(patch)]
            return path if fails(folder, path, words) else None
        known = FOUND.get(name_of(patch))
        if known is not None and (found := first_failure(folder, f"{known}-{known}")):
            return f"seed {found[0]}, {found[1]}"
        begin = 0
        while found := first_failure(folder, f"{begin}-{most - 1}", workers):
            if first_failure(ROOT, f"{found[0]}-{found[0]}") is None:
                return f"seed {found[0]}, {found[1]}"
            begin = found[0] + 1  # this one fails without the patch, too
    return None


def main(arguments: Sequence[str]) -> int:
    """Search for what the command line says; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.bites", description=__doc__)
    parser.add_argument("words", nargs="*", help="only patches in whose names one of these is")
    parser.add_argument("--seeds", type=int, default=MOST_SEEDS, help="how many are tried for each patch")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args(arguments)
    failed = 0
    for patch in patches():
        name = name_of(patch)
        if options.words and not any(word in name for word in options.words):
            continue
        try:
            found = search(patch, options.seeds, options.workers)
        except ValueError as error:
            print(error, flush=True)
            failed += 1
            continue
        print(f"{name}: {found or 'NOT FOUND'}", flush=True)
        failed += found is None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
