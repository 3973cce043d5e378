#!/usr/bin/env python3
"""How long a training step takes on many GPUs, on paper; see docs/cluster.md.

usage: model.py [PARAMETERS MS_PER_IMAGE MS_PER_STEP]
       model.py hosts PARAMETERS MS_ALONE MBIT_PER_S MS

MS_PER_IMAGE and MS_PER_STEP are what a step costs on one GPU for each of its images, and in any case:
measured, or as assumed below. The second form says what `./run` should find on two hosts, where a step
takes MS_ALONE on one and the links are of so many Mbit/s and ms there and back.
"""

import sys

# What is assumed of one GPU: a fifth of an H100's 989 TFLOP/s in bf16 for the 146 GFLOP of an image's
# step at 160/5, and 2,000 kernels one after the other of 2 microseconds each.
PARAMETERS, MS_PER_IMAGE, MS_PER_STEP = 53_659_080, 0.74, 4.0
# And of the machines.
NVLINK = 200e9  # bytes/s that a GPU sends to another one of its machine, while it receives as many
NETWORK = 40e9  # bytes/s to another machine, for each GPU an adapter of 400 Gbit/s
MESSAGE = {"nvlink": 15e-6, "network": 40e-6}  # seconds before a message's first byte is there
# What is ours.
BUCKET = 4 << 20  # values that are summed at a time
BACKWARD = 2 / 3  # of a step: the gradients by inputs and by weights, two thirds of its products
ORDER = 300e-6  # seconds in which rank 0 tells all to go on, and has their nats, each step


def exchanges(ranks, per_machine):
    """Of every level of the tree: between which GPUs, and the share of a bucket that goes each way."""
    level, share, levels = 1, 0.5, []
    while level < ranks:
        levels.append(("nvlink" if level < per_machine else "network", share))
        level, share = 2 * level, share / 2
    return levels


def seconds_of_sum(values, ranks, per_machine):
    """To sum so many values over all ranks, and to hand the sums back."""
    speed = {"nvlink": NVLINK, "network": NETWORK}
    levels = exchanges(ranks, per_machine)
    return sum(2 * (MESSAGE[way] + 4 * values * share / speed[way]) for way, share in levels)


def step(parameters, images, per_image, fixed, ranks, per_machine=8):
    """Seconds of a step with so many images on each GPU, and those of them lost to the others."""
    alone = fixed + images * per_image
    buckets = max(1, round(parameters / BUCKET))
    summed = buckets * seconds_of_sum(parameters / buckets, ranks, per_machine)
    # All but the last bucket are on their way while the backward pass goes on.
    hidden = BACKWARD * alone * (1 - 1 / buckets)
    last = summed / buckets
    lost = 0.0 if ranks == 1 else ORDER + max(last, summed - hidden)
    return alone + lost, lost


def two_hosts(parameters, ms_alone, mbit, ms):
    """Milliseconds of a step on two hosts, without and with the overlap."""
    bucket = 1 << 18  # of the engine on CPUs
    buckets = max(1, round(parameters / bucket))
    half = ms_alone / 2
    # Each way half of a bucket, and the sums back; a message takes half of the time there and back.
    summed = buckets * 2 * (ms / 2 + 4 * parameters / buckets / 2 * 8 / mbit / 1e3)
    # The second of its two shards: its one thread takes them one after the other.
    hidden = BACKWARD * half / 2 * (1 - 1 / buckets)
    return half + summed, half + max(summed / buckets, summed - hidden)


def main():
    if sys.argv[1:2] == ["hosts"]:
        before, now = two_hosts(*map(float, sys.argv[2:]))
        print(f"on two hosts {before:.0f} ms a step, with overlap {now:.0f}")
        return
    given = [float(number) for number in sys.argv[1:]]
    parameters, per_image, fixed = given or [PARAMETERS, MS_PER_IMAGE, MS_PER_STEP]
    print(f"{parameters:,.0f} parameters, {per_image:.2f} ms an image, {fixed:.1f} ms a step")
    # (machines, GPUs of each)
    sizes = [(1, 1), (1, 8), (8, 8), (64, 8)]
    print("\n| GPUs | images on each | batch | ms a step | images/s | lost |\n|--:|--:|--:|--:|--:|--:|")
    for images_of in (lambda ranks: 16, lambda ranks: max(1, 1024 // ranks)):
        for machines, gpus in sizes:
            ranks = machines * gpus
            images = images_of(ranks)
            seconds, lost = step(parameters, images, per_image / 1e3, fixed / 1e3, ranks, gpus)
            print(f"| {machines} x {gpus} | {images} | {images * ranks:,} | {1e3 * seconds:.1f} "
                  f"| {images * ranks / seconds:,.0f} | {100 * lost / seconds:.0f} % |")


main()
