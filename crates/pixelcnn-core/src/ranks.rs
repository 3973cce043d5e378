//! Ranks: processes that train one model together, each on its share of every batch.
//!
//! A batch is cut into a fixed number of shards, whatever the number of ranks. Each rank computes
//! those that follow one another from its own first one on, and all sum them as a binary tree: the
//! shards in pairs, then the pairs, and so on. Where the numbers of shards and ranks are powers of
//! two, the lower levels of that tree are within a rank and the upper ones between ranks, so that the
//! sum has the same bits for any number of ranks.

mod gather;
mod patience;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

pub use gather::gather;
pub use patience::Patience;

/// What a rank asks of the others: messages, in order, between any two.
pub trait Ranks: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn count(&self) -> usize;

    /// As long as an answer is waited for.
    fn patience(&self) -> Duration;

    /// Checks that all others are there, as far as can be told without asking them.
    ///
    /// # Errors
    /// [`RankError::Gone`].
    fn expect_all(&self) -> Result<(), RankError> {
        Ok(())
    }

    /// Whether ranks in long work should say now and then that they are there: a few bytes then go out
    /// whether or not the other one asks for them yet.
    fn speak_at_work(&self) -> bool {
        true
    }

    /// Sends bytes to another rank, which [`receive`](Ranks::receive)s as many.
    ///
    /// # Errors
    /// [`RankError`]; nothing can be expected of the ranks after one.
    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), RankError>;

    /// Receives bytes from another rank.
    ///
    /// # Errors
    /// As [`Ranks::send`].
    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<(), RankError>;

    /// Sends bytes to another rank while receiving others from it.
    ///
    /// # Errors
    /// As [`Ranks::send`].
    fn exchange(&self, with: usize, sent: &[u8], received: &mut [u8]) -> Result<(), RankError>;
}

/// A rank that can't be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RankError {
    /// Nothing came from it in the time in which all should have an answer.
    #[error("rank {rank} has not answered for {seconds} s")]
    Silent {
        /// The other rank.
        rank: usize,
        /// As long it was waited for.
        seconds: u64,
    },
    /// One of them can't be reached, and which one is not known.
    #[error("another rank {reason}")]
    Other {
        /// What is known.
        reason: String,
    },
    /// This rank was told to end while it waited.
    #[error("told to end while waiting for rank {rank}")]
    Ended {
        /// The other rank.
        rank: usize,
    },
    /// It is gone.
    #[error("rank {rank} is gone: {reason}")]
    Gone {
        /// The other rank.
        rank: usize,
        /// What the connection says.
        reason: String,
    },
    /// It can't do its part.
    #[error("rank {rank}: {reason}")]
    Failed {
        /// The other rank.
        rank: usize,
        /// What it says.
        reason: String,
    },
    /// Rank 0 wants no more of this rank's part, or was told why it can't be done.
    #[error("rank 0 has ended the work")]
    Over,
}

/// A process on its own.
#[derive(Debug, Clone, Copy)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn count(&self) -> usize {
        1
    }

    fn patience(&self) -> Duration {
        Duration::MAX
    }

    fn send(&self, to: usize, _: &[u8]) -> Result<(), RankError> {
        Err(nobody(to))
    }

    fn receive(&self, from: usize, _: &mut [u8]) -> Result<(), RankError> {
        Err(nobody(from))
    }

    fn exchange(&self, with: usize, _: &[u8], _: &mut [u8]) -> Result<(), RankError> {
        Err(nobody(with))
    }
}

fn nobody(rank: usize) -> RankError {
    RankError::Gone {
        rank,
        reason: "this process is alone".into(),
    }
}

/// How the images of a batch are shared out.
#[derive(Clone)]
pub struct Sharing {
    /// Who shares.
    pub ranks: Arc<dyn Ranks>,
    /// Images in a whole batch.
    pub images: usize,
    /// Shards of it.
    pub shards: usize,
}

impl fmt::Debug for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rank, count) = (self.ranks.rank(), self.ranks.count());
        write!(f, "rank {rank} of {count}, {} shards", self.shards)
    }
}

/// A batch that can't be shared out so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SharingError {
    /// Their order of sums could not be the same for every number of ranks.
    #[error("{0} {1}: the number must be a power of two")]
    PowerOfTwo(usize, &'static str),
    /// A shard would be empty, or a rank without one.
    #[error("{0} {1} can't be shared by {2} {3}: there must be at least one for each")]
    TooFew(usize, &'static str, usize, &'static str),
}

impl Sharing {
    /// Checks that every rank has its shards.
    ///
    /// # Errors
    /// [`SharingError`].
    pub fn new(
        ranks: Arc<dyn Ranks>,
        images: usize,
        shards: usize,
    ) -> Result<Sharing, SharingError> {
        for (number, of) in [(shards, "shards"), (ranks.count(), "ranks")] {
            if !number.is_power_of_two() {
                return Err(SharingError::PowerOfTwo(number, of));
            }
        }
        if images < shards {
            return Err(SharingError::TooFew(images, "images", shards, "shards"));
        }
        if shards < ranks.count() {
            let count = ranks.count();
            return Err(SharingError::TooFew(shards, "shards", count, "ranks"));
        }
        Ok(Sharing {
            ranks,
            images,
            shards,
        })
    }

    /// This rank's shards, each with the numbers of its images in the whole batch.
    pub fn shards(&self) -> impl Iterator<Item = Range<usize>> {
        let own = share(self.shards, self.ranks.rank(), self.ranks.count());
        own.map(|shard| share(self.images, shard, self.shards))
    }

    /// Images of the largest of this rank's shards.
    pub fn largest(&self) -> usize {
        self.shards().map(|shard| shard.len()).max().unwrap_or(0)
    }

    /// The numbers of this rank's images in the whole batch.
    pub fn images(&self) -> Range<usize> {
        let mut shards = self.shards();
        let first = shards.next().unwrap_or_default();
        first.start..shards.last().map_or(first.end, |last| last.end)
    }
}

/// Part `part` of `parts` that share `0..total` as evenly as can be.
pub fn share(total: usize, part: usize, parts: usize) -> Range<usize> {
    total * part / parts..total * (part + 1) / parts
}

/// Sums of consecutive shards, as a binary tree.
#[derive(Debug)]
pub struct Tree<T> {
    /// Each with how many shards it has.
    sums: Vec<(usize, T)>,
}

impl<T> Default for Tree<T> {
    fn default() -> Self {
        Tree { sums: Vec::new() }
    }
}

impl<T> Tree<T> {
    /// Adds the next shard; `add` adds its second argument to the first one.
    pub fn push(&mut self, shard: T, mut add: impl FnMut(&mut T, T)) {
        let mut top = (1, shard);
        while let Some((_, mut sum)) = self.sums.pop_if(|(shards, _)| *shards == top.0) {
            add(&mut sum, top.1);
            top = (2 * top.0, sum);
        }
        self.sums.push(top);
    }

    /// The sum of all shards, whose number is a power of two.
    pub fn sum(self) -> Option<T> {
        self.sums.into_iter().next().map(|(_, sum)| sum)
    }
}

/// Numbers that are summed over ranks.
pub trait Summed: Copy + Default {
    /// Bytes of each.
    const BYTES: usize;
    /// Its bytes.
    fn bytes(self, to: &mut [u8]);
    /// And back.
    fn of(bytes: &[u8]) -> Self;
    /// Their sum.
    fn plus(self, other: Self) -> Self;
}

macro_rules! summed {
    ($($type:ty)*) => {$(
        impl Summed for $type {
            const BYTES: usize = size_of::<$type>();

            fn bytes(self, to: &mut [u8]) {
                to.copy_from_slice(&self.to_le_bytes());
            }

            fn of(bytes: &[u8]) -> Self {
                bytes.try_into().map_or(Self::default(), Self::from_le_bytes)
            }

            fn plus(self, other: Self) -> Self {
                self + other
            }
        }
    )*};
}

summed!(f32 f64);

/// Sums arrays of all ranks, whose number is a power of two, as the tree's upper levels: every rank
/// has the sum, with the same bits.
///
/// On each level a rank sums one half of what it has, its partner the other one (recursive halving);
/// then they hand the sums back (recursive doubling). So each sends and receives less than twice the
/// array, whatever the number of ranks.
///
/// # Errors
/// [`RankError`].
pub fn sum<T: Summed>(ranks: &dyn Ranks, values: &mut [T]) -> Result<(), RankError> {
    let (mut sent, mut received) = (Vec::new(), Vec::new());
    let levels = levels(0..values.len(), ranks);
    for Level { with, keeps, gives } in &levels {
        encode(&values[gives.clone()], &mut sent);
        received.resize(keeps.len() * T::BYTES, 0);
        ranks.exchange(*with, &sent, &mut received)?;
        let others = received.chunks_exact(T::BYTES).map(T::of);
        for (value, other) in values[keeps.clone()].iter_mut().zip(others) {
            *value = value.plus(other);
        }
    }
    for Level { with, keeps, gives } in levels.into_iter().rev() {
        encode(&values[keeps], &mut sent);
        received.resize(gives.len() * T::BYTES, 0);
        ranks.exchange(with, &sent, &mut received)?;
        let others = received.chunks_exact(T::BYTES).map(T::of);
        for (value, other) in values[gives].iter_mut().zip(others) {
            *value = other;
        }
    }
    Ok(())
}

/// As [`sum`], for some arrays as one.
///
/// # Errors
/// [`RankError`].
pub fn sum_arrays(ranks: &dyn Ranks, arrays: &mut [Vec<f32>]) -> Result<(), RankError> {
    let mut together = arrays.concat();
    sum(ranks, &mut together)?;
    let mut sums = &together[..];
    for array in arrays {
        let (own, others) = sums.split_at(array.len());
        array.copy_from_slice(own);
        sums = others;
    }
    Ok(())
}

/// What a rank does on a level of the tree's upper ones, which are between ranks.
#[derive(Debug, Clone)]
pub struct Level {
    /// The rank that has the same sums so far.
    pub with: usize,
    /// The half of them that this rank goes on to sum.
    pub keeps: Range<usize>,
    /// The half that the other one does.
    pub gives: Range<usize>,
}

/// The levels on which some values are summed over all ranks, from the lowest one up: on each, ranks
/// exchange the halves that they give for those that they keep, which they add. Then the sums are handed
/// back, from the highest level down.
pub fn levels(values: Range<usize>, ranks: &dyn Ranks) -> Vec<Level> {
    let (rank, mut has) = (ranks.rank(), values);
    let level = |level: u32| {
        let middle = has.start + has.len() / 2;
        let (lower, upper) = (has.start..middle, middle..has.end);
        let (keeps, gives) = match rank >> level & 1 {
            0 => (lower, upper),
            _ => (upper, lower),
        };
        has = keeps.clone();
        let with = rank ^ (1 << level);
        Level { with, keeps, gives }
    };
    (0..ranks.count().trailing_zeros()).map(level).collect()
}

fn encode<T: Summed>(values: &[T], to: &mut Vec<u8>) {
    to.resize(values.len() * T::BYTES, 0);
    for (value, to) in values.iter().zip(to.chunks_exact_mut(T::BYTES)) {
        value.bytes(to);
    }
}

/// Gives the bytes that rank 0 has to every rank.
///
/// # Errors
/// [`RankError`].
pub fn broadcast(ranks: &dyn Ranks, bytes: &mut Vec<u8>) -> Result<(), RankError> {
    let mut length = (bytes.len() as u64).to_le_bytes();
    hand_down(ranks, &mut length)?;
    bytes.resize(u64::from_le_bytes(length) as usize, 0);
    hand_down(ranks, bytes)
}

/// As [`broadcast`], where all know how many bytes there are: rank 0 sends to the rank half-way, then
/// both to the ones half-way between, and so on.
fn hand_down(ranks: &dyn Ranks, bytes: &mut [u8]) -> Result<(), RankError> {
    let (rank, count) = (ranks.rank(), ranks.count());
    let mut step = count.next_power_of_two() / 2;
    while step > 0 {
        if rank.is_multiple_of(2 * step) {
            if rank + step < count {
                ranks.send(rank + step, bytes)?;
            }
        } else if rank.is_multiple_of(step) {
            ranks.receive(rank - step, bytes)?;
        }
        step /= 2;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::ranks::side_by_side;

    #[test]
    fn sums_have_the_same_bits_for_any_number_of_ranks() {
        // Values whose sum depends on its order.
        let value = |shard: usize, i: usize| {
            let x = (shard * 7919 + i * 104_729) % 1013;
            (x as f32 - 500.0) * 1.1f32.powi((shard * i) as i32 % 90)
        };
        for length in [0, 1, 2, 13, 1000] {
            let summed = |count: usize| {
                let sums = side_by_side(count, |ranks| {
                    let sharing = Sharing::new(ranks.clone(), 8, 8).unwrap();
                    let mut tree = Tree::default();
                    for shard in sharing.shards() {
                        let values = (0..length).map(|i| value(shard.start, i));
                        tree.push(values.collect::<Vec<f32>>(), |sum, shard| {
                            sum.iter_mut().zip(shard).for_each(|(a, b)| *a += b);
                        });
                    }
                    let mut values = tree.sum().unwrap();
                    sum(&*ranks, &mut values).unwrap();
                    values
                });
                assert!(sums.iter().all(|sum| *sum == sums[0]));
                sums[0].clone()
            };
            let want = summed(1);
            for count in [2, 4, 8] {
                assert_eq!(summed(count), want, "{count} ranks");
            }
            let exact = |i: usize| (0..8).map(|shard| f64::from(value(shard, i))).sum::<f64>();
            for (i, sum) in want.iter().enumerate() {
                let size: f64 = (0..8).map(|shard| f64::from(value(shard, i)).abs()).sum();
                assert!((f64::from(*sum) - exact(i)).abs() <= 1e-6 * size);
            }
        }
    }

    #[test]
    fn every_rank_has_what_rank_0_broadcasts() {
        for count in 1..10 {
            let got = side_by_side(count, |ranks| {
                let mut bytes = match ranks.rank() {
                    0 => (0..1000).map(|n| (n % 251) as u8).collect(),
                    rank => vec![0; rank],
                };
                broadcast(&*ranks, &mut bytes).unwrap();
                bytes
            });
            assert!(got.iter().all(|bytes| *bytes == got[0]));
        }
    }

    #[test]
    fn every_image_is_one_ranks() {
        for (images, shards, count) in [(16, 4, 2), (7, 4, 4), (9, 8, 1), (128, 8, 8)] {
            let shares = side_by_side(count, |ranks| {
                Sharing::new(ranks, images, shards).unwrap().images()
            });
            let all: Vec<usize> = shares.into_iter().flatten().collect();
            assert_eq!(all, (0..images).collect::<Vec<usize>>());
        }
    }

    #[test]
    fn what_can_not_be_shared_is_refused() {
        let refused = |count, images, shards| {
            let said = side_by_side(count, |ranks| {
                Sharing::new(ranks, images, shards).unwrap_err().to_string()
            });
            said[0].clone()
        };
        assert!(refused(3, 16, 4).contains("3 ranks"));
        assert!(refused(1, 16, 6).contains("6 shards"));
        assert!(refused(8, 16, 4).contains("4 shards can't be shared by 8 ranks"));
        assert!(refused(2, 3, 4).contains("3 images can't be shared by 4 shards"));
    }
}
