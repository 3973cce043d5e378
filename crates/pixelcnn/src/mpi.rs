//! Ranks that an MPI launcher has started (`mpirun`, `srun`), on one machine or many.
//!
//! Nothing of MPI waits without an end: where a rank does not answer in time, or rank 0 is told to end
//! meanwhile, the call that waits says so. What was being sent or received then is never freed, for
//! MPI may still touch it.

use std::mem;
use std::os::raw::c_int;
use std::time::Duration;

use mpi::environment::{Threading, Universe};
use mpi::ffi;
use pixelcnn_core::ranks::{Patience, RankError, Ranks};

/// Bytes of a message: MPI counts them with 31 bits.
const LARGEST: usize = 1 << 30;

/// The ranks of an MPI program; all of them end together when it is dropped.
pub struct Mpi {
    rank: usize,
    count: usize,
    patience: Patience,
    _universe: Universe,
}

impl Mpi {
    /// Joins the other ranks; none where MPI can't be begun a second time. They wait for one another as
    /// long as `patience` says, and rank 0 hardly longer once `is_to_end`: the others end with it.
    pub fn join(
        patience: Duration,
        is_to_end: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Option<Mpi> {
        let (universe, _) = mpi::initialize_with_threading(Threading::Serialized)?;
        let (mut rank, mut count) = (0, 0);
        // SAFETY: MPI has begun; the numbers are written before they are read. Errors are to be
        // returned, not to end the program.
        unsafe {
            ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN);
            ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank);
            ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut count);
        }
        Some(Mpi {
            rank: usize::try_from(rank).ok()?,
            count: usize::try_from(count).ok()?,
            patience: Patience::new(patience, move || rank == 0 && is_to_end()),
            _universe: universe,
        })
    }

    /// Ends all ranks at once, where they can't end together.
    pub fn abort(&self, code: u8) -> ! {
        // SAFETY: MPI has begun.
        unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code.into()) };
        std::process::exit(code.into())
    }

    /// Waits for all of some requests to another rank.
    fn wait(&self, other: usize, mut open: Open) -> Result<Open, RankError> {
        let done = self.patience.wait(other, || {
            let mut done: c_int = 0;
            let count = open.requests.len() as c_int;
            // SAFETY: the requests are open, and what they send and receive is held beside them.
            let code = unsafe {
                ffi::MPI_Testall(
                    count,
                    open.requests.as_mut_ptr(),
                    &mut done,
                    ffi::RSMPI_STATUSES_IGNORE,
                )
            };
            gone(other, code)?;
            Ok((done != 0).then_some(()))
        });
        match done {
            Ok(()) => Ok(open),
            Err(error) => {
                mem::forget(open);
                Err(error)
            }
        }
    }

    fn transfer(&self, other: usize, sent: &[u8], received: &mut [u8]) -> Result<(), RankError> {
        let mut open = Open {
            requests: Vec::new(),
            sent: sent.to_vec(),
            received: vec![0; received.len()],
        };
        let received_here = open.received.chunks_mut(LARGEST);
        let received_here = received_here.map(|piece| (piece.as_mut_ptr(), piece.len(), true));
        let sent_here = open.sent.chunks_mut(LARGEST);
        let sent_here = sent_here.map(|piece| (piece.as_mut_ptr(), piece.len(), false));
        let mut begun = Ok(());
        for (at, bytes, receives) in received_here.chain(sent_here) {
            let (at, count, rank) = (at.cast(), bytes as c_int, other as c_int);
            // SAFETY: the bytes stay where they are, and nobody else uses them, until the request is
            // done; the others are constants of MPI.
            let (code, request) = unsafe {
                let (of, all) = (ffi::RSMPI_UINT8_T, ffi::RSMPI_COMM_WORLD);
                let mut request = ffi::RSMPI_REQUEST_NULL;
                let code = match receives {
                    true => ffi::MPI_Irecv(at, count, of, rank, 0, all, &mut request),
                    false => ffi::MPI_Isend(at, count, of, rank, 0, all, &mut request),
                };
                (code, request)
            };
            begun = begun.and(gone(other, code));
            open.requests.push(request);
        }
        if let Err(error) = begun {
            mem::forget(open);
            return Err(error);
        }
        let open = self.wait(other, open)?;
        received.copy_from_slice(&open.received);
        Ok(())
    }
}

/// What is being sent and received.
struct Open {
    requests: Vec<ffi::MPI_Request>,
    sent: Vec<u8>,
    received: Vec<u8>,
}

/// What MPI says of another rank.
fn gone(rank: usize, code: c_int) -> Result<(), RankError> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = vec![0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length: c_int = 0;
    // SAFETY: there is room for the longest text.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    text.truncate(usize::try_from(length).unwrap_or(0));
    Err(RankError::Gone {
        rank,
        reason: String::from_utf8_lossy(&text).into_owned(),
    })
}

impl Ranks for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.count
    }

    fn patience(&self) -> Duration {
        self.patience.limit
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), RankError> {
        self.transfer(to, bytes, &mut [])
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<(), RankError> {
        self.transfer(from, &[], bytes)
    }

    fn exchange(&self, with: usize, sent: &[u8], received: &mut [u8]) -> Result<(), RankError> {
        self.transfer(with, sent, received)
    }
}
