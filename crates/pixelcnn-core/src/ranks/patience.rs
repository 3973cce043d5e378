//! How long ranks wait for one another.

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use super::RankError;

/// As long an answer is waited for once this rank is to end.
const LAST_WAIT: Duration = Duration::from_millis(500);
/// As long an answer is waited for without giving the core to others for longer.
const AWAKE: Duration = Duration::from_micros(200);

/// How long a rank waits for another one.
pub struct Patience {
    /// As long as all should have an answer.
    pub limit: Duration,
    is_to_end: Box<dyn Fn() -> bool + Send + Sync>,
}

impl fmt::Debug for Patience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.limit)
    }
}

impl Patience {
    /// As long as the limit, but hardly longer once `is_to_end`, which is to be true of rank 0 alone: the
    /// others end with it.
    pub fn new(limit: Duration, is_to_end: impl Fn() -> bool + Send + Sync + 'static) -> Patience {
        Patience {
            limit,
            is_to_end: Box::new(is_to_end),
        }
    }

    /// Asks again and again for what another rank may have done by now.
    ///
    /// # Errors
    /// [`RankError::Silent`], [`RankError::Ended`], and those of `ask`.
    pub fn wait<T>(
        &self,
        other: usize,
        mut ask: impl FnMut() -> Result<Option<T>, RankError>,
    ) -> Result<T, RankError> {
        let (begin, mut told) = (Instant::now(), None);
        loop {
            if let Some(answer) = ask()? {
                return Ok(answer);
            }
            let now = Instant::now();
            if (self.is_to_end)() {
                told.get_or_insert(now);
            }
            if now - begin > self.limit {
                let seconds = self.limit.as_secs();
                return Err(RankError::Silent {
                    rank: other,
                    seconds,
                });
            }
            if told.is_some_and(|told| now - told > LAST_WAIT) {
                return Err(RankError::Ended { rank: other });
            }
            match now - begin < AWAKE {
                true => thread::yield_now(),
                false => thread::sleep(Duration::from_micros(50)),
            }
        }
    }
}
