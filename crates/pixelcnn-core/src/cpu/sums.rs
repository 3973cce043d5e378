//! The gradients of a batch's parts, summed over parts, shards and ranks while the backward pass goes
//! on: bucket by bucket, as the layers come to their turn.

use std::collections::BTreeMap;
use std::mem;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender};

use super::{Arrays, Pool, lock};
use crate::network::Layout;
use crate::plan::{self, Plan};
use crate::ranks::{RankError, Ranks, Tree, sum_arrays};

/// Values of a bucket, at least, but for the last one: few enough that most are on their way to other
/// ranks before the backward pass ends, enough that messages are seldom waited for.
const VALUES: usize = 1 << 18;

/// Parameters whose gradients are summed together.
#[derive(Debug)]
pub(super) struct Bucket {
    /// The step of [`Plan::backward`] with which they are there.
    pub step: usize,
    /// Their numbers.
    pub parameters: Vec<usize>,
    /// Memory for them that nobody uses at the moment.
    pub memories: Pool<Arrays>,
}

impl Bucket {
    /// All of a plan, in the order in which they are there.
    pub fn all(plan: &Plan, layout: &Layout) -> Vec<Bucket> {
        let buckets = plan.buckets(layout, VALUES).into_iter();
        let bucket = |plan::Bucket { step, parameters }| Bucket {
            step,
            parameters,
            memories: Pool::default(),
        };
        buckets.map(bucket).collect()
    }

    /// Puts memory for its gradients where the backward pass writes them.
    pub fn lend(&self, layout: &Layout, gradients: &mut Arrays) {
        let mut memories = self.memories.take();
        memories.resize(self.parameters.len(), Vec::new());
        for (&parameter, mut memory) in self.parameters.iter().zip(memories) {
            memory.resize(layout.parameters[parameter].len(), 0.0);
            gradients[parameter] = memory;
        }
    }

    /// Takes its gradients.
    pub fn take(&self, gradients: &mut Arrays) -> Arrays {
        let take = |&parameter: &usize| mem::take(&mut gradients[parameter]);
        self.parameters.iter().map(take).collect()
    }
}

/// Sums of all buckets over the parts of a batch.
pub(super) struct Sums<'a> {
    buckets: &'a [Bucket],
    /// For each part, whether a shard ends with it.
    last: &'a [bool],
    sums: Vec<Mutex<Sum>>,
    /// Takes the buckets that are summed, with their numbers.
    summed: Sender<(usize, Arrays)>,
}

/// A bucket's gradients so far, in the order of the images, so that the sum is the same whoever
/// computed them.
#[derive(Default)]
struct Sum {
    /// Of the whole shards.
    shards: Tree<Arrays>,
    /// Of the shard that is being summed.
    shard: Option<Arrays>,
    /// Number of the part that comes next.
    next: usize,
    /// Those that came before their turn.
    waiting: BTreeMap<usize, Arrays>,
}

impl<'a> Sums<'a> {
    pub fn new(
        buckets: &'a [Bucket],
        last: &'a [bool],
        summed: Sender<(usize, Arrays)>,
    ) -> Sums<'a> {
        Sums {
            buckets,
            last,
            sums: buckets.iter().map(|_| Mutex::default()).collect(),
            summed,
        }
    }

    /// Adds the gradients of a part, as far as a step of the backward pass has completed them.
    pub fn add(&self, part: usize, step: usize, gradients: &mut Arrays) {
        let complete = self.buckets.iter().position(|bucket| bucket.step == step);
        let Some(number) = complete else { return };
        let bucket = &self.buckets[number];
        let mut sum = lock(&self.sums[number]);
        sum.waiting.insert(part, bucket.take(gradients));
        sum.add(self.last, &bucket.memories);
        if sum.next == self.last.len() {
            let shards = mem::take(&mut sum.shards);
            // Where nobody takes it any more, why is known there.
            let _ = shards.sum().map(|whole| self.summed.send((number, whole)));
        }
    }
}

impl Sum {
    /// Adds all whose turn it is; `last` says of each part whether a shard ends with it.
    fn add(&mut self, last: &[bool], memories: &Pool<Arrays>) {
        let add = |sum: &mut Arrays, gradients: Arrays| {
            // By this thread alone: one that waits for others can be given a part by them, and would
            // then wait for itself here.
            for (sum, gradient) in sum.iter_mut().zip(&gradients) {
                for (sum, value) in sum.iter_mut().zip(gradient) {
                    *sum += value;
                }
            }
            memories.give(gradients);
        };
        while let Some(part) = self.waiting.remove(&self.next) {
            match &mut self.shard {
                None => self.shard = Some(part),
                Some(sum) => add(sum, part),
            }
            if last[self.next] {
                let shard = self.shard.take();
                shard
                    .into_iter()
                    .for_each(|shard| self.shards.push(shard, add));
            }
            self.next += 1;
        }
    }
}

/// Sums buckets over all ranks, each as soon as it comes and the ones before it are summed.
pub(super) fn sum_over(
    ranks: &dyn Ranks,
    summed: Receiver<(usize, Arrays)>,
) -> Result<Vec<(usize, Arrays)>, RankError> {
    let (mut waiting, mut done) = (BTreeMap::new(), Vec::new());
    for (number, arrays) in summed {
        waiting.insert(number, arrays);
        // All ranks in the same order.
        while let Some(mut arrays) = waiting.remove(&done.len()) {
            sum_arrays(ranks, &mut arrays)?;
            done.push((done.len(), arrays));
        }
    }
    Ok(done)
}
