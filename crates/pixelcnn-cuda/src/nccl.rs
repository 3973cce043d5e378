//! The GPUs of other ranks, by way of NCCL.
//!
//! Nothing of it waits without an end: a communicator that isn't ready, or sums that don't come, are
//! asked after again and again for as long as ranks are patient, and then abandoned.

use std::ffi::{c_int, c_void};
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{
    cudaStream_t, ncclComm, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclResult_t, ncclUniqueId,
};
use libloading::Library;
use pixelcnn_core::ranks::{RankError, Ranks, broadcast};

use crate::{CudaError, libraries};

/// How long what is waited for is left alone.
const PAUSE: Duration = Duration::from_micros(50);

/// The library as the system calls it. The bindings' own loader looks for other names, under which a
/// Python environment has it not.
const NAME: &str = "libnccl.so.2";

/// Its functions.
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> ncclResult_t,
    comm_init_rank_config: unsafe extern "C" fn(
        *mut ncclComm_t,
        c_int,
        ncclUniqueId,
        c_int,
        *mut ncclConfig_t,
    ) -> ncclResult_t,
    comm_get_async_error: unsafe extern "C" fn(ncclComm_t, *mut ncclResult_t) -> ncclResult_t,
    comm_abort: unsafe extern "C" fn(ncclComm_t) -> ncclResult_t,
    group_start: unsafe extern "C" fn() -> ncclResult_t,
    group_end: unsafe extern "C" fn() -> ncclResult_t,
    send: unsafe extern "C" fn(
        *const c_void,
        usize,
        ncclDataType_t,
        c_int,
        ncclComm_t,
        cudaStream_t,
    ) -> ncclResult_t,
    receive: unsafe extern "C" fn(
        *mut c_void,
        usize,
        ncclDataType_t,
        c_int,
        ncclComm_t,
        cudaStream_t,
    ) -> ncclResult_t,
}

impl Functions {
    /// Those of the library, which is loaded once and for as long as the program runs.
    fn load() -> Option<&'static Functions> {
        static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
        if let Some(functions) = FUNCTIONS.get() {
            return Some(functions);
        }
        // SAFETY: NCCL is made to be loaded, and these are its functions as it declares them.
        let functions = unsafe {
            let library = Library::new(NAME).ok()?;
            let functions = Functions {
                get_unique_id: *library.get("ncclGetUniqueId").ok()?,
                comm_init_rank_config: *library.get("ncclCommInitRankConfig").ok()?,
                comm_get_async_error: *library.get("ncclCommGetAsyncError").ok()?,
                comm_abort: *library.get("ncclCommAbort").ok()?,
                group_start: *library.get("ncclGroupStart").ok()?,
                group_end: *library.get("ncclGroupEnd").ok()?,
                send: *library.get("ncclSend").ok()?,
                receive: *library.get("ncclRecv").ok()?,
            };
            mem::forget(library);
            functions
        };
        Some(FUNCTIONS.get_or_init(|| functions))
    }
}

/// Whether the library is to be found by its name.
pub(crate) unsafe fn is_present() -> bool {
    Functions::load().is_some()
}

/// What names the ranks that come together.
type Id = [u8; size_of::<ncclUniqueId>()];

fn new_id(functions: &Functions) -> Result<Id, CudaError> {
    let mut id = ncclUniqueId { internal: [0; _] };
    // SAFETY: there is room for it.
    expect(unsafe { (functions.get_unique_id)(&mut id) })?;
    // SAFETY: both are so many bytes, of which any are values.
    Ok(unsafe { mem::transmute::<ncclUniqueId, Id>(id) })
}

/// This rank's GPU among those of all ranks.
pub(crate) struct Nccl {
    functions: &'static Functions,
    /// A communicator, which any thread may use, one at a time: the engine has a lock. None once it is
    /// abandoned.
    comm: AtomicPtr<ncclComm>,
    ranks: Arc<dyn Ranks>,
}

impl Nccl {
    /// Brings the GPUs of all ranks together; this rank's context is bound.
    pub fn join(ranks: &Arc<dyn Ranks>) -> Result<Nccl, CudaError> {
        libraries::expect_nccl()?;
        let functions = Functions::load().ok_or(CudaError::Refused("NCCL is gone".into()))?;
        let mut id = match ranks.rank() {
            0 => new_id(functions)?.to_vec(),
            _ => Vec::new(),
        };
        broadcast(&**ranks, &mut id)?;
        // Anything else says that rank 0 could not.
        let id = Id::try_from(id).map_err(|_| RankError::Over)?;
        // As the header says that a configuration begins.
        let undefined = c_int::MIN;
        let mut config = ncclConfig_t {
            size: size_of::<ncclConfig_t>(),
            magic: 0xcafe_beef,
            version: 22_203,
            // Its functions come back at once.
            blocking: 0,
            cgaClusterSize: undefined,
            minCTAs: undefined,
            maxCTAs: undefined,
            netName: ptr::null(),
            splitShare: undefined,
        };
        let mut comm = ptr::null_mut();
        let (count, rank) = (ranks.count() as c_int, ranks.rank() as c_int);
        // SAFETY: an identifier is so many bytes, of which any are values; the rest is written above.
        let begun = unsafe {
            let id = mem::transmute::<Id, ncclUniqueId>(id);
            (functions.comm_init_rank_config)(&mut comm, count, id, rank, &mut config)
        };
        let nccl = Nccl {
            functions,
            comm: AtomicPtr::new(comm),
            ranks: Arc::clone(ranks),
        };
        nccl.finish(begun)?;
        Ok(nccl)
    }

    /// Lets a stream send values to a rank and receive as many as it sends.
    ///
    /// # Safety
    /// There are so many values of four bytes at the addresses.
    pub unsafe fn exchange(
        &self,
        stream: CUstream,
        with: usize,
        sent: (u64, usize),
        received: (u64, usize),
    ) -> Result<(), CudaError> {
        let (float, with, stream) = (ncclDataType_t::ncclFloat32, with as c_int, stream.cast());
        let (functions, comm) = (self.functions, self.comm()?);
        // SAFETY: the communicator is there; the caller knows the memory and the stream.
        unsafe {
            expect((functions.group_start)())?;
            let asked = [
                (functions.send)(sent.0 as *const _, sent.1, float, with, comm, stream),
                (functions.receive)(received.0 as *mut _, received.1, float, with, comm, stream),
            ];
            let begun = (functions.group_end)();
            asked.into_iter().try_for_each(expect)?;
            self.finish(begun)
        }
    }

    /// Waits until what was begun is done.
    fn finish(&self, begun: ncclResult_t) -> Result<(), CudaError> {
        expect(begun)?;
        self.wait(|| self.is_ready())
    }

    fn is_ready(&self) -> Result<bool, CudaError> {
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is there, and so is room for its state.
        expect(unsafe { (self.functions.comm_get_async_error)(self.comm()?, &mut state) })?;
        expect(state)?;
        Ok(state != ncclResult_t::ncclInProgress)
    }

    /// Waits until something is done for which other ranks may be needed, for as long as they are
    /// waited for; then it is abandoned.
    pub fn wait(&self, is_done: impl Fn() -> Result<bool, CudaError>) -> Result<(), CudaError> {
        let begin = Instant::now();
        loop {
            if is_done()? {
                return Ok(());
            }
            let waited = begin.elapsed();
            // What went wrong elsewhere is known here too.
            let mut there = self.is_ready().map(drop);
            if waited > self.ranks.patience() {
                let seconds = self.ranks.patience().as_secs();
                let reason = format!("has not answered for {seconds} s");
                there = Err(RankError::Other { reason }.into());
            }
            if let Err(error) = there.and_then(|()| Ok(self.ranks.expect_all()?)) {
                self.abandon();
                return Err(error);
            }
            match waited < Duration::from_millis(1) {
                true => thread::yield_now(),
                false => thread::sleep(PAUSE),
            }
        }
    }

    /// The communicator, unless it was abandoned.
    pub fn comm(&self) -> Result<ncclComm_t, CudaError> {
        match self.comm.load(Ordering::Relaxed) {
            comm if comm.is_null() => Err(CudaError::Refused("NCCL: it was given up".into())),
            comm => Ok(comm),
        }
    }

    /// Ends what is under way, so that streams go on.
    fn abandon(&self) {
        let comm = self.comm.swap(ptr::null_mut(), Ordering::Relaxed);
        if comm.is_null() {
            return;
        }
        let (abort, comm) = (self.functions.comm_abort, comm as usize);
        // What is under way is ended at once; the rest of it waits until no graph has the communicator.
        // SAFETY: it is there, and nobody else has it any more.
        thread::spawn(move || unsafe { abort(comm as ncclComm_t) });
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.abandon();
    }
}

fn expect(result: ncclResult_t) -> Result<(), CudaError> {
    use ncclResult_t::*;
    let said = match result {
        ncclSuccess | ncclInProgress => return Ok(()),
        ncclUnhandledCudaError => "a call of CUDA fails",
        ncclSystemError => "the system refuses",
        ncclInvalidArgument | ncclInvalidUsage => {
            "it is used wrongly, as where two ranks have the same GPU"
        }
        ncclRemoteError => {
            let reason = "is gone: NCCL has lost it".into();
            return Err(RankError::Other { reason }.into());
        }
        _ => "it fails",
    };
    let help = "NCCL_DEBUG=WARN in the environment makes it say more";
    Err(CudaError::Refused(format!("NCCL: {said}: {help}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs libnccl: `pip install nvidia-nccl-cu13` in an active environment"]
    fn its_functions_are_the_librarys() {
        libraries::expect_nccl().unwrap();
        let functions = Functions::load().unwrap();
        let ids = [new_id(functions).unwrap(), new_id(functions).unwrap()];
        assert_ne!(ids[0], ids[1]);
    }
}
