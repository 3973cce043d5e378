//! Ranks that are processes of one machine, which the first of them starts: for as many GPUs.
//!
//! They tell one another what to do through channels of the system. Gradients go from GPU to GPU.

use std::io;
use std::process::Child;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ipc_channel::TryRecvError;
use ipc_channel::ipc::{
    IpcBytesReceiver, IpcBytesSender, IpcOneShotServer, IpcSender, bytes_channel, channel as pair,
};
use pixelcnn_core::ranks::{Patience, RankError, Ranks};
use serde::{Deserialize, Serialize};

/// As long as processes may take to end once they are done.
const LEAVE: Duration = Duration::from_secs(10);

/// A rank among the processes that the first one has started.
pub struct Local {
    rank: usize,
    patience: Patience,
    /// To and from every rank, this one too.
    senders: Vec<Mutex<IpcBytesSender>>,
    receivers: Vec<Mutex<IpcBytesReceiver>>,
    /// Those that this one has started, from rank 1 on.
    children: Mutex<Children>,
    #[cfg(unix)]
    parent: u32,
}

/// What a process is given to be a rank.
#[derive(Serialize, Deserialize)]
struct Place {
    rank: usize,
    senders: Vec<IpcBytesSender>,
    receivers: Vec<IpcBytesReceiver>,
}

impl Local {
    /// Becomes rank 0 of so many, of which `start` starts the others: each is to
    /// [join](Local::join) by the name that it is given.
    ///
    /// # Errors
    /// Where the system gives no processes or channels, or a process ends at once.
    pub fn begin(
        count: usize,
        patience: Patience,
        mut start: impl FnMut(&str) -> io::Result<Child>,
    ) -> io::Result<Local> {
        let (mut servers, mut children) = (Vec::new(), Children::default());
        for _ in 1..count {
            let (server, name) = IpcOneShotServer::<IpcSender<Place>>::new()?;
            children.0.push(start(&name)?);
            servers.push(server);
        }
        let mut joined = Vec::new();
        for (number, server) in servers.into_iter().enumerate() {
            let (accepted, waiting) = channel();
            thread::spawn(move || accepted.send(server.accept()));
            joined.push(loop {
                match waiting.recv_timeout(Duration::from_millis(100)) {
                    Ok(accepted) => break accepted.map_err(io::Error::other)?.1,
                    Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::Other.into()),
                    Err(RecvTimeoutError::Timeout) => {
                        if let Some(status) = children.0[number].try_wait()? {
                            let rank = number + 1;
                            return Err(io::Error::other(format!("rank {rank} ended: {status}")));
                        }
                    }
                }
            });
        }
        // None of the channels is anyone else's: they are made when all processes are there.
        let mut places: Vec<Place> = (0..count)
            .map(|rank| Place {
                rank,
                senders: Vec::new(),
                receivers: Vec::new(),
            })
            .collect();
        for from in 0..count {
            for to in 0..count {
                let (sender, receiver) = bytes_channel()?;
                places[from].senders.push(sender);
                places[to].receivers.push(receiver);
            }
        }
        let mut places = places.into_iter();
        let own = places.next().ok_or(io::ErrorKind::InvalidInput)?;
        for (process, place) in joined.into_iter().zip(places) {
            process.send(place).map_err(io::Error::other)?;
        }
        Ok(Local {
            children: Mutex::new(children),
            ..Local::new(own, patience)
        })
    }

    /// Becomes the rank that rank 0 has started this process as.
    ///
    /// # Errors
    /// Where it is not there.
    pub fn join(name: String, patience: Patience) -> io::Result<Local> {
        let rank_0 = IpcSender::<IpcSender<Place>>::connect(name)?;
        let (sender, receiver) = pair()?;
        rank_0.send(sender).map_err(io::Error::other)?;
        let place = receiver.recv().map_err(io::Error::other)?;
        Ok(Local::new(place, patience))
    }

    fn new(place: Place, patience: Patience) -> Local {
        Local {
            rank: place.rank,
            patience,
            senders: place.senders.into_iter().map(Mutex::new).collect(),
            receivers: place.receivers.into_iter().map(Mutex::new).collect(),
            children: Mutex::default(),
            #[cfg(unix)]
            parent: std::os::unix::process::parent_id(),
        }
    }

    /// Ends the processes that rank 0 has started, at once. Another rank waits for that, so that rank 0
    /// doesn't take it for the one that has failed.
    pub fn end(&self) {
        lock(&self.children).end();
        let begin = Instant::now();
        while self.rank > 0 && self.expect_all().is_ok() && begin.elapsed() < LEAVE {
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn gone(rank: usize, reason: impl ToString) -> RankError {
        let reason = reason.to_string();
        RankError::Gone { rank, reason }
    }
}

/// Processes that end with this one.
#[derive(Default)]
struct Children(Vec<Child>);

impl Children {
    fn end(&mut self) {
        for child in &mut self.0 {
            // One that is gone needs no end.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Children {
    /// Waits for them to end by themselves, but not for long.
    fn drop(&mut self) {
        let begin = Instant::now();
        let is_there = |child: &mut Child| matches!(child.try_wait(), Ok(None));
        while self.0.iter_mut().any(is_there) && begin.elapsed() < LEAVE {
            thread::sleep(Duration::from_millis(5));
        }
        self.end();
    }
}

impl Ranks for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.senders.len()
    }

    fn patience(&self) -> Duration {
        self.patience.limit
    }

    fn expect_all(&self) -> Result<(), RankError> {
        for (number, child) in lock(&self.children).0.iter_mut().enumerate() {
            // One that has done its part may leave.
            if let Ok(Some(status)) = child.try_wait()
                && !status.success()
            {
                return Err(Local::gone(number + 1, status));
            }
        }
        #[cfg(unix)]
        if self.rank > 0 && std::os::unix::process::parent_id() != self.parent {
            return Err(Local::gone(0, "its process has ended"));
        }
        Ok(())
    }

    /// What nobody reads fills the channels, and who has died is known without words.
    fn speak_at_work(&self) -> bool {
        false
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), RankError> {
        let sent = lock(&self.senders[to]).send(bytes);
        sent.map_err(|error| Local::gone(to, error))
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<(), RankError> {
        let receiver = lock(&self.receivers[from]);
        let message = self.patience.wait(from, || match receiver.try_recv() {
            Ok(message) => Ok(Some(message)),
            Err(TryRecvError::Empty) => self.expect_all().map(|()| None),
            Err(_) => {
                self.expect_all()?;
                Err(Local::gone(from, "its process has ended"))
            }
        })?;
        match message.len() == bytes.len() {
            true => bytes.copy_from_slice(&message),
            false => return Err(Local::gone(from, "it has another version of this program")),
        }
        Ok(())
    }

    /// One of them sends first: neither could send much while nobody receives it.
    fn exchange(&self, with: usize, sent: &[u8], received: &mut [u8]) -> Result<(), RankError> {
        match self.rank < with {
            true => {
                self.send(with, sent)?;
                self.receive(with, received)
            }
            false => {
                self.receive(with, received)?;
                self.send(with, sent)
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
