//! Ranks that are threads of one process.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pixelcnn_core::ranks::{RankError, Ranks};

/// As long a rank waits for another one.
const SECONDS: u64 = 60;

struct Thread {
    rank: usize,
    senders: Vec<Sender<Vec<u8>>>,
    receivers: Vec<Mutex<Receiver<Vec<u8>>>>,
}

impl Ranks for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.senders.len()
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(SECONDS)
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), RankError> {
        let sent = self.senders[to].send(bytes.to_vec());
        sent.map_err(|error| RankError::Gone {
            rank: to,
            reason: error.to_string(),
        })
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<(), RankError> {
        let receiver = self.receivers[from].lock().unwrap();
        match receiver.recv_timeout(Duration::from_secs(SECONDS)) {
            Ok(message) => bytes.copy_from_slice(&message),
            Err(RecvTimeoutError::Timeout) => {
                let (rank, seconds) = (from, SECONDS);
                return Err(RankError::Silent { rank, seconds });
            }
            Err(error) => {
                return Err(RankError::Gone {
                    rank: from,
                    reason: error.to_string(),
                });
            }
        }
        Ok(())
    }

    fn exchange(&self, with: usize, sent: &[u8], received: &mut [u8]) -> Result<(), RankError> {
        self.send(with, sent)?;
        self.receive(with, received)
    }
}

/// Calls `f` as so many ranks at the same time, and gives the results in their order.
pub fn side_by_side<R: Send>(count: usize, f: impl Fn(Arc<dyn Ranks>) -> R + Sync) -> Vec<R> {
    let mut ranks: Vec<Thread> = (0..count)
        .map(|rank| Thread {
            rank,
            senders: Vec::new(),
            receivers: Vec::new(),
        })
        .collect();
    for from in 0..count {
        for to in 0..count {
            let (sender, receiver) = channel();
            ranks[from].senders.push(sender);
            ranks[to].receivers.push(Mutex::new(receiver));
        }
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| scope.spawn(|| f(Arc::new(rank))))
            .collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.collect()
    })
}
