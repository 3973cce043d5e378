//! The processes that an MPI launcher (`mpirun`, `srun`) has started as ranks of one work.

use std::env;
use std::error::Error;
use std::fmt::Debug;
use std::process::{self, ExitCode};
use std::sync::Arc;
#[cfg(feature = "mpi")]
use std::time::Duration;

use clap::Args;
use pixelcnn::compress::ModelHash;
use pixelcnn::data::Dataset;
use pixelcnn::kernels::simd;
#[cfg(feature = "mpi")]
use pixelcnn::mpi::Mpi;
use pixelcnn::ranks::{Alone, RankError, Ranks, broadcast, gather};
use pixelcnn::train::TrainError;

use crate::terminal::{INTERRUPTED, Result, be_silent, catch_interrupts, complain, interrupted};
use crate::trained::Trained;

/// The flag of commands that are the work of one or many.
#[derive(Debug, Args)]
pub struct RankFlags {
    /// Seconds for which ranks, the processes that `mpirun` starts to do this together, wait for one
    /// another before they take one for dead
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    patience: u32,
}

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
        Some([size, _]) => {
            say_once(|| Err(format!("{size} processes were started: {what}").into()))
        }
    }
}

/// Ends with what the first process says, where a launcher has started many: they all fail alike.
pub fn say_once<T>(say: impl FnOnce() -> T) -> T {
    match launched() {
        // Not as a failure, or the launcher may end the first one before it has spoken.
        Some([_, rank]) if rank > 0 => process::exit(0),
        _ => say(),
    }
}

/// The ranks that do something together, this one among them.
pub struct Team {
    /// To talk to the others.
    pub ranks: Arc<dyn Ranks>,
    #[cfg(feature = "mpi")]
    mpi: Option<Arc<Mpi>>,
}

/// Runs a command as one of the ranks that do it together, of which rank 0 alone says and writes
/// anything. All end where one can't go on.
pub fn together(
    flags: &RankFlags,
    command: impl FnOnce(&Team) -> Result<ExitCode>,
) -> Result<ExitCode> {
    let team = Team::join(flags)?;
    if !team.leads() {
        be_silent();
        // It ends with rank 0.
        catch_interrupts("")?;
    }
    let error = match command(&team) {
        Err(error) => error,
        done => return done,
    };
    let unreachable = of_rank(&*error);
    let rank = team.ranks.rank();
    let code = match (rank, unreachable) {
        (0, None) => return Err(error),
        (0, Some(_)) if interrupted().is_break() => {
            complain("pixelcnn: interrupted: nothing was written");
            INTERRUPTED
        }
        (0, Some(_)) => {
            complain(format_args!("pixelcnn: {error}"));
            1
        }
        // Rank 0 knows why.
        (_, Some(RankError::Over)) => return Ok(ExitCode::SUCCESS),
        _ => {
            complain(format_args!("pixelcnn: rank {rank}: {error}"));
            1
        }
    };
    team.abort(code)
}

/// What an error says of another rank.
fn of_rank<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a RankError> {
    let training = || error.downcast_ref::<TrainError>()?.of_rank();
    error.downcast_ref().or_else(training)
}

impl Team {
    /// Joins the other processes, where a launcher has started some. They wait for one another as long
    /// as the flags say; rank 0 gives up at once when it is told to end.
    #[cfg(feature = "mpi")]
    fn join(flags: &RankFlags) -> Result<Team> {
        if launched().is_none() && env::var_os("PMIX_RANK").is_none() {
            let ranks = Arc::new(Alone);
            return Ok(Team { ranks, mpi: None });
        }
        let patience = Duration::from_secs(flags.patience.into());
        let mpi = Mpi::join(patience, || interrupted().is_break()).ok_or("MPI can't be begun")?;
        let mpi = Arc::new(mpi);
        Ok(Team {
            ranks: mpi.clone(),
            mpi: Some(mpi),
        })
    }

    /// Checks that there are no other processes, which need MPI to do anything together.
    #[cfg(not(feature = "mpi"))]
    fn join(_flags: &RankFlags) -> Result<Team> {
        expect_alone("this build can't share work out; build it with the cargo feature mpi")?;
        let ranks = Arc::new(Alone);
        Ok(Team { ranks })
    }

    /// Whether this process says and saves what all of them do.
    pub fn leads(&self) -> bool {
        self.ranks.rank() == 0
    }

    /// Makes what a command needs, on rank 0 before it is made on the others, which then find what was
    /// fetched. `common` says of it what must be the same on all ranks.
    pub fn prepare<T>(
        &self,
        prepare: impl FnOnce() -> Result<T>,
        common: impl FnOnce(&T) -> Result<String>,
    ) -> Result<T> {
        let ranks = &*self.ranks;
        if ranks.count() == 1 {
            return prepare();
        }
        if !self.leads() {
            let mut prepared = None;
            follow(ranks)?;
            gather(ranks, |_| {
                let made = prepare()?;
                let common = common(&made)?;
                prepared = Some(made);
                Result::Ok(common)
            })?;
            follow(ranks)?;
            return prepared.ok_or_else(|| RankError::Over.into());
        }
        let prepared = lead(ranks, prepare())?;
        let all: Vec<String> = gather(ranks, |_| common(&prepared))?;
        let other = all.iter().position(|common| *common != all[0]);
        let same = other.map_or(Ok(()), |rank| {
            Err(format!(
                "rank {rank} has another model, other images, other flags, other vector \
                 instructions or another version of this program than rank 0: give all ranks the same"
            )
            .into())
        });
        lead(ranks, same)?;
        Ok(prepared)
    }

    /// Ends all ranks at once, for some of them can't be reached.
    pub fn abort(&self, code: u8) -> ! {
        #[cfg(feature = "mpi")]
        if let Some(mpi) = &self.mpi {
            mpi.abort(code);
        }
        process::exit(code.into())
    }
}

/// Tells the other ranks whether what rank 0 does has failed.
fn lead<T>(ranks: &dyn Ranks, done: Result<T>) -> Result<T> {
    broadcast(ranks, &mut vec![u8::from(done.is_ok())])?;
    done
}

/// Goes on unless what rank 0 does has failed.
fn follow(ranks: &dyn Ranks) -> Result {
    let mut word = Vec::new();
    broadcast(ranks, &mut word)?;
    match word[..] {
        [1] => Ok(()),
        _ => Err(RankError::Over.into()),
    }
}

/// What ranks must have in common that do something with a model and images: the flags of the
/// `command` too.
pub fn common(
    command: &dyn Debug,
    trained: &Trained,
    raw: bool,
    data: &[&Dataset],
) -> Result<String> {
    let mut common = vec![
        env!("CARGO_PKG_VERSION").to_owned(),
        format!("{command:?}"),
        format!("{:?}", simd::level()),
        ModelHash::of(trained.model(), trained.parameters(raw)?).to_string(),
    ];
    for data in data {
        common.push(data.fingerprint()?);
    }
    Ok(common.join("\n"))
}
