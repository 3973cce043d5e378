//! The processes that an MPI launcher (`mpirun`, `srun`) has started as ranks of one training.

use std::env;
use std::process;
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "mpi")]
use pixelcnn::mpi::Mpi;
use pixelcnn::ranks::{Alone, Ranks};

use crate::terminal::Result;
#[cfg(feature = "mpi")]
use crate::terminal::interrupted;

/// What a launcher tells the processes that it starts: how many there are, and which one this is. Open
/// MPI's, and that of MPICH and its kin.
const LAUNCHERS: [[&str; 2]; 2] = [
    ["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"],
    ["PMI_SIZE", "PMI_RANK"],
];

/// How many processes a launcher has started as one program, where it is more than one, and which one
/// this is.
fn launched() -> Option<[usize; 2]> {
    let number = |name: &str| env::var(name).ok()?.parse::<usize>().ok();
    let mut launchers = LAUNCHERS.iter();
    let found = launchers.find_map(|[size, rank]| Some([number(size)?, number(rank)?]));
    found.filter(|[size, _]| *size > 1)
}

/// Checks that what only one process can do is not done by many at once.
pub fn expect_alone(what: &str) -> Result {
    match launched() {
        None => Ok(()),
        Some([size, 0]) => Err(format!("{size} processes were started: {what}").into()),
        // The first one says it.
        Some(_) => process::exit(1),
    }
}

/// The ranks that train together, this one among them.
pub struct Team {
    /// To talk to the others.
    pub ranks: Arc<dyn Ranks>,
    #[cfg(feature = "mpi")]
    mpi: Option<Arc<Mpi>>,
}

impl Team {
    /// Joins the other processes, where a launcher has started some. They wait for one another as long
    /// as `patience` says; rank 0 gives up at once when it is told to end.
    #[cfg(feature = "mpi")]
    pub fn join(patience: Duration) -> Result<Team> {
        if launched().is_none() && env::var_os("PMIX_RANK").is_none() {
            let ranks = Arc::new(Alone);
            return Ok(Team { ranks, mpi: None });
        }
        let mpi = Mpi::join(patience, || interrupted().is_break()).ok_or("MPI can't be begun")?;
        let mpi = Arc::new(mpi);
        Ok(Team {
            ranks: mpi.clone(),
            mpi: Some(mpi),
        })
    }

    /// Checks that there are no other processes, which need MPI to train together.
    #[cfg(not(feature = "mpi"))]
    pub fn join(_patience: Duration) -> Result<Team> {
        expect_alone("this build can't train on many; build it with the cargo feature mpi")?;
        let ranks = Arc::new(Alone);
        Ok(Team { ranks })
    }

    /// Whether this process says and saves what all of them do.
    pub fn leads(&self) -> bool {
        self.ranks.rank() == 0
    }

    /// Ends all ranks at once, for some of them can't be reached.
    pub fn abort(&self) -> ! {
        #[cfg(feature = "mpi")]
        if let Some(mpi) = &self.mpi {
            mpi.abort(1);
        }
        process::exit(1)
    }
}
