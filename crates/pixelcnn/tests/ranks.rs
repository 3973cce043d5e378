//! Ranks that train together end as a process alone, whatever happens to them on the way.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lab::{last_state, records};
use pixelcnn::data::{DataConfig, Dataset};
use pixelcnn::device::Device;
use pixelcnn::ranks::{Alone, RankError, Ranks};
use pixelcnn::train::checkpoints::Checkpoints;
use pixelcnn::train::config::{Optimizer, PolyakStart, RunConfig, TrainConfig};
use pixelcnn::train::metrics::Record;
use pixelcnn::train::ranks::{announce, announced};
use pixelcnn::train::state::TrainState;
use pixelcnn::train::{Event, Outcome, TrainError, Training};
use tempfile::TempDir;

#[path = "../../pixelcnn-core/tests/suite/ranks.rs"]
mod threads;

mod lab;

const STEPS: u64 = 12;

/// Pictures, and the settings of a run that learns them: 7 steps an epoch.
fn prepared(seed: u8) -> (TempDir, RunConfig) {
    let folder = tempfile::tempdir().unwrap();
    let pictures = folder.path().join("pictures");
    fs::create_dir(&pictures).unwrap();
    lab::write_pictures(&pictures, seed);
    let train = TrainConfig {
        batch_size: 4,
        shards: Some(4),
        steps: STEPS,
        warmup_steps: 4,
        cooldown: 0.3,
        optimizer: Optimizer::Muon,
        polyak_start: PolyakStart::Growing,
        ..TrainConfig::default()
    };
    let config = lab::config(&pictures, train);
    (folder, config)
}

/// One rank of a run: rank 0 begins or resumes it, the others follow.
fn train(
    run: &Path,
    config: &RunConfig,
    ranks: &Arc<dyn Ranks>,
    observer: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<Outcome, TrainError> {
    let announced = match ranks.rank() {
        0 => {
            announce(&**ranks, run, config)?;
            (run.to_owned(), config.clone())
        }
        _ => announced(&**ranks)?.expect("rank 0 trains"),
    };
    assert_eq!(announced, (run.to_owned(), config.clone()));
    let (images, test) = Dataset::open_splits(&config.data).unwrap();
    let training = Training {
        folder: run,
        config,
        images: &images,
        test: &test,
        device: Device::CPU,
        ranks: Some(ranks),
    };
    if ranks.rank() > 0 {
        training.follow(&mut || ControlFlow::Continue(()))?;
        return Ok(Outcome::Finished);
    }
    match Checkpoints::new(run.join("checkpoints")).latest() {
        Ok((state, _)) => training.resume(state, observer),
        Err(_) => training.begin(observer),
    }
}

/// Trains on so many ranks up to a step.
fn train_on(
    count: usize,
    run: &Path,
    config: &RunConfig,
    last: u64,
) -> Result<Outcome, TrainError> {
    let outcomes = threads::side_by_side(count, |ranks| {
        train(run, config, &ranks, &mut |event| match event {
            Event::Step { step, .. } if step == last => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })
    });
    let outcomes: Result<Vec<Outcome>, TrainError> = outcomes.into_iter().collect();
    Ok(outcomes?[0])
}

/// What a run has, but for the time that it took.
fn outcome(run: &Path) -> (TrainState, Vec<Record>, Vec<u8>) {
    let samples = fs::read(run.join("samples.png")).unwrap();
    (last_state(run), records(run), samples)
}

#[test]
fn any_number_of_ranks_ends_with_the_same_bits() {
    let (folder, config) = prepared(0);
    let alone = folder.path().join("alone");
    let ranks: Arc<dyn Ranks> = Arc::new(Alone);
    let mut go_on = |_| ControlFlow::Continue(());
    train(&alone, &config, &ranks, &mut go_on).unwrap();
    for count in [2, 4] {
        let run = folder.path().join(format!("{count}"));
        let ended = train_on(count, &run, &config, u64::MAX).unwrap();
        assert_eq!(ended, Outcome::Finished);
        assert_eq!(outcome(&run), outcome(&alone), "{count} ranks");
    }
    // Stopped, and gone on with by others.
    let run = folder.path().join("changing");
    for (count, last) in [(2, 3), (4, 7), (1, 9), (2, u64::MAX)] {
        train_on(count, &run, &config, last).unwrap();
    }
    assert_eq!(outcome(&run), outcome(&alone));
}

/// When the time is up, all ranks cool down over the same steps, in two sittings: as a run of that
/// many steps does.
#[test]
fn time_decides_for_all_ranks() {
    let (folder, config) = prepared(0);
    let run = folder.path().join("by time");
    let mut by_time = config.clone();
    (by_time.train.hours, by_time.train.steps) = (1000.0, 3);
    train_on(2, &run, &by_time, 7).unwrap();
    let (mut state, path) = Checkpoints::new(run.join("checkpoints")).latest().unwrap();
    assert_eq!(state.last_step, None);
    state.seconds = 700.0 * 3600.0;
    state.write(&path).unwrap();
    for (last, outcome) in [(8, Outcome::Stopped), (u64::MAX, Outcome::Finished)] {
        assert_eq!(train_on(2, &run, &by_time, last).unwrap(), outcome);
        assert_eq!(last_state(&run).last_step, Some(10));
    }

    let alone = folder.path().join("by steps");
    let mut by_steps = config;
    by_steps.train.steps = 10;
    train_on(1, &alone, &by_steps, u64::MAX).unwrap();
    let [by_time, by_steps] = [&run, &alone].map(|run| outcome(run));
    assert_eq!(by_time.0.step, 10);
    assert_eq!(by_time.0.parameters, by_steps.0.parameters);
    assert_eq!(by_time.0.average, by_steps.0.average);
    assert_eq!(by_time.2, by_steps.2);
}

#[test]
fn what_can_not_be_shared_is_refused_once() {
    let (folder, config) = prepared(0);
    let run = folder.path().join("run");
    for (count, said) in [
        (8, "can't be shared by 8 ranks"),
        (3, "3 ranks: the number must be"),
    ] {
        let ended = threads::side_by_side(count, |ranks| {
            let mut go_on = |_| ControlFlow::Continue(());
            train(&run, &config, &ranks, &mut go_on)
        });
        let error = ended[0].as_ref().unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        assert!(ended[1..].iter().all(Result::is_ok));
        assert!(!run.exists());
    }
}

#[test]
fn ranks_with_other_images_are_refused() {
    let (folder, config) = prepared(0);
    let (_other_folder, other) = prepared(1);
    let errors = threads::side_by_side(2, |ranks| {
        let config = match ranks.rank() {
            0 => config.clone(),
            // The same settings, elsewhere.
            _ => other.clone(),
        };
        let (images, test) = Dataset::open_splits(&config.data).unwrap();
        let training = Training {
            folder: &folder.path().join("run"),
            config: &RunConfig {
                data: DataConfig::default(),
                ..config
            },
            images: &images,
            test: &test,
            device: Device::CPU,
            ranks: Some(&ranks),
        };
        match ranks.rank() {
            0 => training.begin(&mut |_| ControlFlow::Continue(())).map(drop),
            _ => training.follow(&mut || ControlFlow::Continue(())),
        }
    });
    assert!(matches!(
        errors[1],
        Err(TrainError::Ranks("other training images"))
    ));
    // Before a step was taken.
    let error = errors[0].as_ref().unwrap_err();
    assert!(error.of_rank().is_some(), "{error}");
}

/// A rank that is gone after so many messages.
struct Mortal {
    ranks: Arc<dyn Ranks>,
    left: AtomicUsize,
}

impl Mortal {
    fn live(&self) -> Result<(), RankError> {
        let left = self.left.load(Ordering::Relaxed);
        self.left.store(left.saturating_sub(1), Ordering::Relaxed);
        match left {
            0 => Err(RankError::Gone {
                rank: self.ranks.rank(),
                reason: "it was killed".into(),
            }),
            _ => Ok(()),
        }
    }
}

impl Ranks for Mortal {
    fn rank(&self) -> usize {
        self.ranks.rank()
    }

    fn count(&self) -> usize {
        self.ranks.count()
    }

    fn patience(&self) -> Duration {
        self.ranks.patience()
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), RankError> {
        self.live()?;
        self.ranks.send(to, bytes)
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<(), RankError> {
        self.live()?;
        self.ranks.receive(from, bytes)
    }

    fn exchange(&self, with: usize, sent: &[u8], received: &mut [u8]) -> Result<(), RankError> {
        self.live()?;
        self.ranks.exchange(with, sent, received)
    }
}

#[test]
fn a_rank_that_dies_ends_all_and_nothing_is_lost() {
    let (folder, config) = prepared(0);
    let whole = folder.path().join("whole");
    train_on(1, &whole, &config, u64::MAX).unwrap();
    let whole = outcome(&whole);
    for (number, life) in (3..).step_by(11).take(25).enumerate() {
        let run = folder.path().join(format!("{number}"));
        let dies = 1 + number % 3;
        let ended = threads::side_by_side(4, |ranks| {
            let ranks = match ranks.rank() == dies {
                true => Arc::new(Mortal {
                    ranks,
                    left: life.into(),
                }),
                false => ranks,
            };
            let mut go_on = |_| ControlFlow::Continue(());
            train(&run, &config, &ranks, &mut go_on)
        });
        if let Err(error) = &ended[0] {
            assert!(error.of_rank().is_some(), "{error}");
            assert!(ended.iter().all(Result::is_err));
            // Whatever was done is saved.
            if let TrainError::Lost { .. } = error {
                panic!("{error}");
            }
        }
        train_on(2, &run, &config, u64::MAX).unwrap();
        assert_eq!(outcome(&run), whole, "dead after {life} messages");
    }
}
