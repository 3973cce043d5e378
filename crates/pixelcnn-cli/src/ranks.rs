//! The processes that do one work together as ranks: an MPI launcher (`mpirun`, `srun`) has started
//! them, or the first of them has, for as many GPUs.

use std::env;
use std::error::Error;
use std::fmt::Debug;
use std::process::{self, ExitCode};
use std::sync::Arc;
#[cfg(any(feature = "cuda", feature = "mpi"))]
use std::time::Duration;

use clap::Args;
use pixelcnn::archive::ModelHash;
use pixelcnn::data::Dataset;
use pixelcnn::device::Device;
use pixelcnn::kernels::simd;
#[cfg(feature = "cuda")]
use pixelcnn::local::Local;
#[cfg(feature = "mpi")]
use pixelcnn::mpi::Mpi;
#[cfg(feature = "cuda")]
use pixelcnn::ranks::Patience;
use pixelcnn::ranks::{Alone, RankError, Ranks, broadcast, gather};
use pixelcnn::train::TrainError;

use crate::terminal::{INTERRUPTED, Result, be_silent, catch_interrupts, complain, interrupted};
use crate::trained::Trained;

/// The flag of commands that are the work of one or many.
#[derive(Debug, Clone, Copy, Args)]
pub struct RankFlags {
    /// Seconds for which ranks, the processes that do this together, wait for one another before they
    /// take one for dead
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    patience: u32,
}

/// The flags of commands that can be the work of many GPUs.
#[derive(Debug, Clone, Copy, Args)]
pub struct GpuFlags {
    #[command(flatten)]
    ranks: RankFlags,
    /// Share the work out to N GPUs of this machine, each with a process of its own; with
    /// --device cpu to N processes on the CPU [default: 1]
    #[cfg(feature = "cuda")]
    #[arg(long, value_name = "N", alias = "nr-gpu")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=16))]
    gpus: Option<u16>,
}

impl RankFlags {
    #[cfg(any(feature = "cuda", feature = "mpi"))]
    fn patience(self) -> Duration {
        Duration::from_secs(self.patience.into())
    }
}

impl From<RankFlags> for GpuFlags {
    fn from(ranks: RankFlags) -> GpuFlags {
        GpuFlags {
            ranks,
            #[cfg(feature = "cuda")]
            gpus: None,
        }
    }
}

impl GpuFlags {
    fn gpus(&self) -> usize {
        #[cfg(feature = "cuda")]
        return self.gpus.unwrap_or(1).into();
        #[cfg(not(feature = "cuda"))]
        1
    }
}

/// Names the process that has started this one as a rank.
#[cfg(feature = "cuda")]
const STARTED_BY: &str = "PIXELCNN_STARTED_BY";

/// What a launcher tells the processes that it starts: how many there are, and which one this is. Open
/// MPI's, and that of MPICH and its kin.
const LAUNCHERS: [[&str; 2]; 2] = [
    ["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"],
    ["PMI_SIZE", "PMI_RANK"],
];

/// And which of those on the same machine it is, and how many those are; Slurm's does not say.
#[cfg(feature = "mpi")]
const NEIGHBOURS: [[&str; 2]; 3] = [
    ["OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"],
    ["MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
    ["SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"],
];

fn number(name: &str) -> Option<usize> {
    env::var(name).ok()?.parse().ok()
}

/// How many processes a launcher has started as one program, where it is more than one, and which one
/// this is.
fn launched() -> Option<[usize; 2]> {
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
    /// Which of the ranks on this machine it is, and how many those are.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    pub here: [usize; 2],
    /// Whether they were started for as many GPUs.
    pub is_on_gpus: bool,
    /// What ends all of them, where they can't end together.
    end: Box<dyn Fn(u8)>,
}

/// Runs a command as one of the ranks that do it together, of which rank 0 alone says and writes
/// anything. All end where one can't go on.
pub fn together(
    flags: impl Into<GpuFlags>,
    command: impl FnOnce(&Team) -> Result<ExitCode>,
) -> Result<ExitCode> {
    let team = Team::join(flags.into())?;
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
        // So does it here, where all are its own processes.
        (_, Some(RankError::Gone { .. })) if team.is_on_gpus => 1,
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
    /// Joins the other processes, or starts them. They wait for one another as long as the flags say;
    /// rank 0 gives up soon when it is told to end.
    fn join(flags: GpuFlags) -> Result<Team> {
        let gpus = flags.gpus();
        #[cfg(feature = "cuda")]
        if let Some(team) = Team::on_this_machine(flags.ranks, gpus)? {
            return Ok(team);
        }
        match Team::launched(flags.ranks)? {
            Some(_) if gpus > 1 => Err("--gpus: a launcher has started processes already: \
                                        leave it out and let it start one for each GPU"
                .into()),
            Some(team) => Ok(team),
            None => Ok(Team {
                ranks: Arc::new(Alone),
                here: [0, 1],
                is_on_gpus: false,
                end: Box::new(|_| ()),
            }),
        }
    }

    /// Those that this process starts, or that have started it.
    #[cfg(feature = "cuda")]
    fn on_this_machine(flags: RankFlags, gpus: usize) -> Result<Option<Team>> {
        let failed = |error| format!("the ranks on this machine can't come together: {error}");
        let local = match env::var(STARTED_BY) {
            Ok(name) => {
                let patience = Patience::new(flags.patience(), || false);
                Local::join(name, patience).map_err(failed)?
            }
            Err(_) if gpus == 1 || launched().is_some() => return Ok(None),
            Err(_) => {
                let patience = Patience::new(flags.patience(), || interrupted().is_break());
                let start = |name: &str| {
                    let mut command = process::Command::new(env::current_exe()?);
                    let arguments = env::args_os().skip(1);
                    let command = command.args(arguments).env(STARTED_BY, name);
                    command.stdin(process::Stdio::null()).spawn()
                };
                Local::begin(gpus, patience, start).map_err(failed)?
            }
        };
        let local = Arc::new(local);
        Ok(Some(Team {
            ranks: local.clone(),
            here: [local.rank(), local.count()],
            is_on_gpus: true,
            end: Box::new(move |_| local.end()),
        }))
    }

    /// Those that a launcher has started.
    #[cfg(feature = "mpi")]
    fn launched(flags: RankFlags) -> Result<Option<Team>> {
        if launched().is_none() && env::var_os("PMIX_RANK").is_none() {
            return Ok(None);
        }
        let mpi = Mpi::join(flags.patience(), || interrupted().is_break());
        let mpi = mpi.ok_or("MPI can't be begun")?;
        let mpi = Arc::new(mpi);
        let mut neighbours = NEIGHBOURS.iter();
        let here = neighbours.find_map(|[rank, count]| Some([number(rank)?, number(count)?]));
        // Where the launcher shows each process a GPU of its own, that is the first one.
        let visible = env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
        let here = here.filter(|_| visible.is_empty() || visible.contains(','));
        Ok(Some(Team {
            ranks: mpi.clone(),
            here: here.unwrap_or([0, 1]),
            is_on_gpus: false,
            end: Box::new(move |code| mpi.abort(code)),
        }))
    }

    /// Checks that there are none, which need MPI to do anything together.
    #[cfg(not(feature = "mpi"))]
    fn launched(_: RankFlags) -> Result<Option<Team>> {
        expect_alone("this build can't share work out; build it with the cargo feature mpi")?;
        Ok(None)
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
                "rank {rank} has another model, other images, other flags, another kind of device or \
                 another version of this program than rank 0: give all ranks the same"
            )
            .into())
        });
        lead(ranks, same)?;
        Ok(prepared)
    }

    /// Ends all ranks at once, for some of them can't be reached.
    pub fn abort(&self, code: u8) -> ! {
        (self.end)(code);
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
    device: Device,
    data: &[&Dataset],
) -> Result<String> {
    let mut common = vec![
        env!("CARGO_PKG_VERSION").to_owned(),
        device.kind(),
        format!("{command:?}"),
        format!("{:?}", simd::level()),
        ModelHash::of(trained.model(), trained.parameters(raw)?).to_string(),
    ];
    for data in data {
        common.push(data.fingerprint()?);
    }
    Ok(common.join("\n"))
}
