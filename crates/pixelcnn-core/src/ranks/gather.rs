//! Work that ranks share out.

use std::fmt::Display;
use std::mem;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{RankError, Ranks};

/// How often a rank that works says so, or more often where it is waited for less than four times as
/// long.
const INTERVAL: Duration = Duration::from_secs(5);

/// What a rank tells another one of its part, in a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Word {
    /// It takes a while yet.
    Working,
    /// It is done, or can't be.
    Done,
    /// Send what came of yours.
    Send,
    /// Yours is of no use any more.
    Over,
}

const WORDS: [Word; 4] = [Word::Working, Word::Done, Word::Send, Word::Over];

fn tell(ranks: &dyn Ranks, to: usize, word: Word) -> Result<(), RankError> {
    ranks.send(to, &[word as u8])
}

/// The next word of a rank but that it works; `meanwhile` is called with each of those.
fn hear(ranks: &dyn Ranks, from: usize, mut meanwhile: impl FnMut()) -> Result<Word, RankError> {
    loop {
        let mut byte = [0];
        ranks.receive(from, &mut byte)?;
        match WORDS.get(usize::from(byte[0])) {
            Some(Word::Working) => meanwhile(),
            Some(&word) => return Ok(word),
            None => return Err(not_understood(from)),
        }
    }
}

fn not_understood(rank: usize) -> RankError {
    RankError::Failed {
        rank,
        reason: "it has another version of this program".into(),
    }
}

/// Says to some ranks that this one works, and looks whether they are there.
struct Pulse<'a> {
    ranks: &'a dyn Ranks,
    said: Instant,
    reached: Result<(), RankError>,
}

impl Pulse<'_> {
    /// Breaks where the work is of no use any more.
    fn beat(&mut self, mut listeners: impl Iterator<Item = usize>) -> ControlFlow<()> {
        let interval = INTERVAL.min(self.ranks.patience() / 4);
        if self.said.elapsed() >= interval && self.reached.is_ok() {
            self.said = Instant::now();
            self.reached = match self.ranks.speak_at_work() {
                true => listeners.try_for_each(|rank| tell(self.ranks, rank, Word::Working)),
                false => self.ranks.expect_all(),
            };
        }
        match self.reached {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }
}

/// Does this rank's part of a work that all ranks do, and gives rank 0 what came of each part, in the
/// ranks' order; the others get nothing. `part` calls what it is given now and then, for it may take
/// longer than ranks wait for a word, and stops where that breaks.
///
/// # Errors
/// On rank 0 its own part's, [`RankError::Failed`] with another one's, or where one can't be reached.
/// On the others [`RankError::Over`], where any part fails.
pub fn gather<T: Serialize + DeserializeOwned, E: From<RankError> + Display>(
    ranks: &dyn Ranks,
    part: impl FnOnce(&mut dyn FnMut() -> ControlFlow<()>) -> Result<T, E>,
) -> Result<Vec<T>, E> {
    let mut pulse = Pulse {
        ranks,
        said: Instant::now(),
        reached: Ok(()),
    };
    if ranks.rank() > 0 {
        let part = part(&mut || pulse.beat(0..1)).map_err(|error| error.to_string());
        pulse.reached?;
        tell(ranks, 0, Word::Done)?;
        if hear(ranks, 0, || ())? == Word::Over {
            return Err(RankError::Over.into());
        }
        send(ranks, 0, &part)?;
        return match part {
            Ok(_) => Ok(Vec::new()),
            Err(_) => Err(RankError::Over.into()),
        };
    }
    let others = 1..ranks.count();
    let own = part(&mut || pulse.beat(others.clone()));
    let reached = mem::replace(&mut pulse.reached, Ok(()));
    let own = reached.map_err(E::from).and(own);
    let mut parts = Vec::new();
    // Whom these words don't reach is gone.
    let over = |rank: usize| drop(tell(ranks, rank, Word::Over));
    parts.push(own.inspect_err(|_| others.clone().for_each(over))?);
    for rank in others {
        let later = rank + 1..ranks.count();
        let mut ask = || {
            let meanwhile = || {
                let _ = pulse.beat(later.clone());
            };
            hear(ranks, rank, meanwhile).inspect_err(|_| over(rank))?;
            tell(ranks, rank, Word::Send)?;
            let part: Result<T, String> = receive(ranks, rank)?;
            part.map_err(|reason| RankError::Failed { rank, reason })
        };
        parts.push(ask().inspect_err(|_| later.clone().for_each(over))?);
    }
    Ok(parts)
}

fn send<T: Serialize>(ranks: &dyn Ranks, to: usize, value: &T) -> Result<(), RankError> {
    // Values have no parts that can't be written.
    let bytes = postcard::to_stdvec(value).unwrap_or_default();
    ranks.send(to, &(bytes.len() as u64).to_le_bytes())?;
    ranks.send(to, &bytes)
}

fn receive<T: DeserializeOwned>(ranks: &dyn Ranks, from: usize) -> Result<T, RankError> {
    let mut length = [0; size_of::<u64>()];
    ranks.receive(from, &mut length)?;
    let mut bytes = vec![0; u64::from_le_bytes(length) as usize];
    ranks.receive(from, &mut bytes)?;
    postcard::from_bytes(&bytes).map_err(|_| not_understood(from))
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::suite::ranks::side_by_side;

    #[test]
    fn rank_0_has_every_part_in_order() {
        for count in [1, 2, 3, 8] {
            let gathered = side_by_side(count, |ranks| {
                let part = vec![ranks.rank() as u32; 1000 * ranks.rank()];
                gather(&*ranks, |_| Ok::<_, RankError>(part)).unwrap()
            });
            let want: Vec<Vec<u32>> = (0..count).map(|n| vec![n as u32; 1000 * n]).collect();
            assert_eq!(gathered[0], want);
            assert!(gathered[1..].iter().all(Vec::is_empty));
        }
    }

    #[test]
    fn a_part_that_fails_ends_the_work() {
        for failing in 0..3 {
            // A rank that has left can't be told anything.
            let leave = Barrier::new(3);
            let errors = side_by_side(3, |ranks| {
                let gathered = gather(&*ranks, |_| match ranks.rank() == failing {
                    true => Err(RankError::Ended { rank: 7 }),
                    false => Ok(1),
                });
                leave.wait();
                gathered.err()
            });
            let why = RankError::Ended { rank: 7 };
            let over = Some(RankError::Over);
            let failed = |rank: usize| {
                let reason = why.to_string();
                Some(RankError::Failed { rank, reason })
            };
            let want = match failing {
                0 => [Some(why.clone()), over.clone(), over],
                1 => [failed(1), over.clone(), over],
                // Rank 1's part was there before.
                _ => [failed(2), None, over],
            };
            assert_eq!(errors, want);
        }
    }
}
