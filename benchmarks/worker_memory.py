"""Memory of a warm worker over many trials: it has to stay flat, or a long search ends in an OOM.

    python benchmarks/worker_memory.py [--trials 30]

Runs short trials of the digits in one process, one after the other in the same `Resources`, with
another learning rate, batch size, seed and, now and then, another architecture, as a search does.
Prints the resident memory after each and fails if it grew by more than 50 MB after the third.
"""

import argparse
import sys

import psutil

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.messages import Job
from nanovlm.resources import Resources
from nanovlm.trial import run_trial

MAX_GROWTH_MB = 50
NUM_WARM_UP_TRIALS = 3


def job_of(number: int) -> Job:
    """Return the `number`-th trial of a small search over the digits."""
    vlm = VLMConfig(
        vit_hidden_dim=64,
        vit_patch_size=8,
        vit_img_size=32,
        vit_n_heads=2,
        vit_n_blocks=2,
        lm_hidden_dim=64,
        lm_inter_dim=128,
        lm_vocab_size=256,
        lm_n_heads=4,
        lm_n_kv_heads=2,
        lm_n_blocks=2,
        lm_tokenizer="builtin:digits",
        lm_dropout=0.1 * (number // 5 % 3),  # three architectures in turn, two are kept
        vlm_load_backbone_weights=False,
    )
    config = TrainConfig(
        lr_mp=1e-3 * (1 + number % 4),
        lr_backbones=1e-3,
        batch_size=(32, 48, 64)[number % 3],
        data_cutoff_idx=200,
        epochs=1,
        train_dataset_path="builtin:digits",
        train_dataset_name=("default",),
        test_dataset_path="builtin:digits",
        seed=number,
        compile=False,
        vlm=vlm,
    )
    return Job(trial_id=f"trial_{number}", config=config, milestones=(config.batch_size,))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=30)
    num_trials = parser.parse_args().trials
    process, resources = psutil.Process(), Resources("cpu")
    megabytes = []
    for number in range(num_trials):
        for _ in run_trial(job_of(number), resources):
            pass
        megabytes.append(process.memory_info().rss / 1e6)
        print(f"trial {number + 1:2}: {megabytes[-1]:7.1f} MB", flush=True)
    growth = max(megabytes[NUM_WARM_UP_TRIALS:]) - megabytes[NUM_WARM_UP_TRIALS - 1]
    print(f"growth after trial {NUM_WARM_UP_TRIALS}: {growth:.1f} MB (at most {MAX_GROWTH_MB})")
    return int(growth > MAX_GROWTH_MB)


if __name__ == "__main__":
    sys.exit(main())
