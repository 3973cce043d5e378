//! Runs that stop for whatever reason and go on end as those that never stopped.

mod lab;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use lab::{last_state, records};
use pixelcnn::Model;
use pixelcnn::data::Dataset;
use pixelcnn::device::Device;
use pixelcnn::train::checkpoints::Checkpoints;
use pixelcnn::train::config::{Optimizer, PolyakStart, RunConfig, TrainConfig};
use pixelcnn::train::metrics::Record;
use pixelcnn::train::state::TrainState;
use pixelcnn::train::{Event, Outcome, TrainError, Training};
use tempfile::TempDir;

const STEPS: u64 = 45;

/// A folder of pictures and of runs that learn them: 13 steps an epoch, an evaluation after each
/// and samples after every other.
struct Lab {
    folder: TempDir,
}

impl Lab {
    fn new() -> Lab {
        let lab = Lab {
            folder: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(lab.pictures()).unwrap();
        lab.write_pictures();
        lab
    }

    fn pictures(&self) -> PathBuf {
        self.folder.path().join("pictures")
    }

    fn write_pictures(&self) {
        lab::write_pictures(&self.pictures(), 0);
    }

    fn run(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self) -> RunConfig {
        let train = TrainConfig {
            batch_size: 2,
            steps: STEPS,
            warmup_steps: 4,
            cooldown: 0.3,
            optimizer: Optimizer::Muon,
            polyak_start: PolyakStart::Growing,
            ..TrainConfig::default()
        };
        lab::config(&self.pictures(), train)
    }

    /// What is done with the training of a run.
    fn training<T>(&self, run: &Path, work: impl FnOnce(&Training) -> T) -> T {
        let config = self.config();
        let (images, test) = Dataset::open_splits(&config.data).unwrap();
        work(&Training {
            folder: run,
            config: &config,
            images: &images,
            test: &test,
            device: Device::CPU,
            ranks: None,
        })
    }

    /// Begins a run, or goes on with it from its newest checkpoint.
    fn train(
        &self,
        run: &Path,
        observer: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Outcome, TrainError> {
        self.training(run, |training| {
            match Checkpoints::new(run.join("checkpoints")).latest() {
                Ok((state, _)) => training.resume(state, observer),
                Err(_) => training.begin(observer),
            }
        })
    }

    /// A run that never stops.
    fn whole(&self) -> PathBuf {
        let run = self.run("whole");
        assert_eq!(self.train(&run, &mut go_on).unwrap(), Outcome::Finished);
        run
    }
}

fn go_on(_: Event) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn stop_after(last: u64) -> impl FnMut(Event) -> ControlFlow<()> {
    move |event| match event {
        Event::Step { step, .. } if step == last => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    }
}

/// The names of all files of a run, sorted, but for TensorBoard's, of which each start makes one, and
/// without the steps of checkpoints.
fn files(run: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for folder in ["", "checkpoints/", "samples/"] {
        for entry in fs::read_dir(run.join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let checkpoint = name.starts_with("step-") && name.ends_with(".safetensors");
            let name = if checkpoint { "step" } else { &name };
            names.push(format!("{folder}{name}"));
        }
    }
    names.retain(|name| !name.contains("tfevents"));
    names.sort();
    names
}

/// Whether TensorBoard is shown a picture.
fn is_shown(run: &Path, picture: &[u8]) -> bool {
    let entries = fs::read_dir(run)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut events = entries.filter(|path| path.to_string_lossy().contains("tfevents"));
    events.any(|path| {
        let events = fs::read(path).unwrap();
        events.windows(picture.len()).any(|part| part == picture)
    })
}

/// Checks that a run has all that one which never stopped has.
#[track_caller]
fn expect_same(run: &Path, whole: &Path) {
    assert_eq!(last_state(run), last_state(whole));
    assert_eq!(records(run), records(whole));
    assert_eq!(files(run), files(whole));
    for name in files(whole).iter().filter(|name| name.ends_with(".png")) {
        let picture = fs::read(whole.join(name)).unwrap();
        assert_eq!(fs::read(run.join(name)).unwrap(), picture, "{name}");
        assert!(is_shown(run, &picture), "{name}");
    }
}

#[test]
fn the_metrics_of_a_run_do_not_depend_on_its_stops() {
    let lab = Lab::new();
    let whole = lab.whole();
    let steps: Vec<u64> = records(&whole).iter().map(Record::step).collect();
    assert_eq!(steps, [13, 20, 26, 39, 40, 45]);
    // Before, at and after records and evaluations; then at every step.
    for (run, stops) in [
        ("seldom", vec![7, 19, 21, 33]),
        ("at records", vec![13, 20, 26, 40]),
        ("always", (1..STEPS).collect()),
    ] {
        let run = lab.run(run);
        for step in stops {
            assert_eq!(
                lab.train(&run, &mut stop_after(step)).unwrap(),
                Outcome::Stopped
            );
            assert_eq!(last_state(&run).step, step);
        }
        assert_eq!(lab.train(&run, &mut go_on).unwrap(), Outcome::Finished);
        expect_same(&run, &whole);
    }
}

#[test]
fn an_error_stops_a_run_without_loss() {
    let lab = Lab::new();
    let whole = lab.whole();
    let run = lab.run("run");

    // The pictures that were not read yet become unreadable.
    let error = lab.train(&run, &mut |event| {
        if matches!(event, Event::Step { step: 3, .. }) {
            for picture in fs::read_dir(lab.pictures()).unwrap() {
                fs::write(picture.unwrap().path(), b"no picture").unwrap();
            }
        }
        ControlFlow::Continue(())
    });
    let error = error.unwrap_err();
    assert!(
        matches!(&error, TrainError::Saved { error, step: 3 } if matches!(**error, TrainError::Data(_))),
        "{error}"
    );
    assert!(error.to_string().ends_with("; all 3 steps taken are saved"));
    assert_eq!(last_state(&run).step, 3);
    lab.write_pictures();

    // A folder is where the best checkpoint goes.
    let best = run.join("checkpoints/best.safetensors");
    fs::create_dir_all(best.join("inside")).unwrap();
    for _ in 0..2 {
        let error = lab.train(&run, &mut go_on).unwrap_err();
        assert!(
            matches!(error, TrainError::Saved { step: 13, .. }),
            "{error}"
        );
        assert!(!last_state(&run).is_evaluated());
    }
    fs::remove_dir_all(best).unwrap();

    // A file is where the folder of samples goes.
    let error = lab.train(&run, &mut |event| {
        if matches!(event, Event::Step { step: 14, .. }) {
            fs::write(run.join("samples"), b"").unwrap();
        }
        ControlFlow::Continue(())
    });
    let error = error.unwrap_err();
    assert!(
        matches!(&error, TrainError::Saved { error, step: 26 } if matches!(**error, TrainError::Picture(_))),
        "{error}"
    );
    assert!(last_state(&run).is_evaluated());
    fs::remove_file(run.join("samples")).unwrap();

    assert_eq!(lab.train(&run, &mut go_on).unwrap(), Outcome::Finished);
    expect_same(&run, &whole);
}

#[test]
fn what_cannot_be_saved_is_said() {
    let lab = Lab::new();
    let run = lab.run("run");
    let error = lab.train(&run, &mut |event| {
        if matches!(event, Event::Step { step: 3, .. }) {
            fs::remove_dir_all(lab.pictures()).unwrap();
            // Where the state would be saved.
            let path = run.join("checkpoints/step-00000003.safetensors/inside");
            fs::create_dir_all(path).unwrap();
        }
        ControlFlow::Continue(())
    });
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("; steps 1 to 3 could not be saved (cannot write"),
        "{error}"
    );
}

#[test]
fn pictures_that_are_behind_are_mended_and_leftovers_go() {
    let lab = Lab::new();
    let whole = lab.whole();
    let run = lab.run("run");
    lab.train(&run, &mut go_on).unwrap();
    let [first, last] = [26, STEPS].map(|step| run.join(format!("samples/step-{step:08}.png")));
    // As after a kill: events that don't show the last picture, and one of before beside the run.
    for entry in fs::read_dir(&run).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().contains("tfevents") {
            fs::remove_file(path).unwrap();
        }
    }
    for mend in [0, 1] {
        match mend {
            0 => drop(fs::copy(&first, run.join("samples.png")).unwrap()),
            _ => fs::remove_file(&last).unwrap(),
        }
        for folder in ["", "checkpoints/", "samples/"] {
            fs::write(run.join(format!("{folder}.file.x.partial")), b"x").unwrap();
        }
        lab.train(&run, &mut go_on).unwrap();
        assert!(is_shown(&run, &fs::read(&last).unwrap()));
        assert_eq!(files(&run), files(&whole));
        assert_eq!(
            fs::read(run.join("samples.png")).unwrap(),
            fs::read(&last).unwrap()
        );
    }
}

#[test]
fn going_back_is_whole_at_once() {
    let lab = Lab::new();
    let run = lab.run("run");
    lab.train(&run, &mut stop_after(30)).unwrap();
    let checkpoints = Checkpoints::new(run.join("checkpoints"));
    let back = TrainState::read(&checkpoints.list().unwrap()[1]).unwrap();
    let config = lab.config();
    let (images, test) = Dataset::open_splits(&config.data).unwrap();
    let training = Training {
        folder: &run,
        config: &config,
        images: &images,
        test: &test,
        device: Device::CPU,
        ranks: None,
    };
    let step = back.step;
    let mut stop = |_| ControlFlow::Break(());
    training.resume(back, &mut stop).unwrap();
    // Neither the newest checkpoint nor the metrics are of later steps than the other.
    assert_eq!(last_state(&run).step, step);
    assert!(records(&run).iter().all(|record| record.step() <= step));
}

/// One that begins with a model's weights is a run like any other.
#[test]
fn a_run_can_begin_with_a_model() {
    let lab = Lab::new();
    let whole = lab.whole();
    let model = Model::open(&whole).unwrap();
    let begin = |run: &Path, observer: &mut dyn FnMut(Event) -> ControlFlow<()>| {
        lab.training(run, |training| {
            let first = TrainState::of_model(model.clone(), training.config, training.images);
            let first = first.unwrap();
            assert_eq!(first.parameters, model.weights);
            training.begin_with(first, observer)
        })
    };
    let tuned = lab.run("tuned");
    assert_eq!(begin(&tuned, &mut go_on).unwrap(), Outcome::Finished);
    assert_ne!(last_state(&tuned), last_state(&whole));

    // Before its first step it is saved: it goes on with those weights.
    let stopped = lab.run("stopped");
    let mut at_once = |event| match event {
        Event::Started { .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    assert_eq!(begin(&stopped, &mut at_once).unwrap(), Outcome::Stopped);
    assert_eq!(last_state(&stopped).parameters, model.weights);
    assert_eq!(lab.train(&stopped, &mut go_on).unwrap(), Outcome::Finished);
    expect_same(&stopped, &tuned);

    // It does not take the place of another.
    let before = last_state(&whole);
    let refused = begin(&whole, &mut go_on);
    assert!(matches!(refused, Err(TrainError::Begun { .. })));
    assert_eq!(last_state(&whole), before);
}

#[test]
fn a_new_run_does_not_take_the_place_of_another() {
    let lab = Lab::new();
    let run = lab.whole();
    let config = lab.config();
    let (images, test) = Dataset::open_splits(&config.data).unwrap();
    let training = Training {
        folder: &run,
        config: &config,
        images: &images,
        test: &test,
        device: Device::CPU,
        ranks: None,
    };
    let error = training.begin(&mut go_on).unwrap_err();
    assert!(matches!(error, TrainError::Begun { .. }), "{error}");
    assert_eq!(last_state(&run).step, STEPS);
}
