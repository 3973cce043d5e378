//! The trained model that a command is given: a run folder, of which the newest checkpoint is
//! taken, a checkpoint file, a file of exported weights, or `shipped:NAME` for one that is part of this
//! program; where none is named, that of CIFAR-10.

use std::error::Error;
use std::path::{Path, PathBuf};

#[cfg(feature = "pretrained")]
use pixelcnn::Shipped;
use pixelcnn::archive::CodingModel;
use pixelcnn::data::{DataConfig, DataError, Dataset, Listener, Split};
use pixelcnn::device::Device;
use pixelcnn::incremental::EvaluatorError;
use pixelcnn::network::Network;
use pixelcnn::train::checkpoints::{CheckpointError, Checkpoints};
use pixelcnn::train::run::{Run, RunError, is_run};
use pixelcnn::train::state::TrainState;
use pixelcnn::weights::hub;
use pixelcnn::weights::safetensors::FileError;
use pixelcnn::{Model, ModelConfig};

use crate::output::is_standard;
use crate::settings::DataFlags;
use crate::terminal::{Result, note, opening, quoted};

/// A trained model.
pub enum Trained {
    /// From a checkpoint of a training.
    Run(Box<Run>),
    /// One set of weights: of a file that `export` wrote, or the ones that are part of this program.
    Exported(Box<Exported>),
}

/// One set of weights with what they say of themselves.
pub struct Exported {
    /// The weights.
    pub model: Model,
    /// What they were trained on, where that is a data set known by its name.
    data: Option<DataConfig>,
}

impl Trained {
    /// Opens the model off the front of the files given to `pixelcnn COMMAND`, and gives the rest:
    /// the shipped model and all of them where the first one is none.
    pub fn open_first<'a>(files: &'a [PathBuf], command: &str) -> Result<(Trained, &'a [PathBuf])> {
        let (model, rest) = Trained::named_first(files)?;
        Ok((Trained::open(model, command)?, rest))
    }

    /// The name of a model that is the first of some files, and the rest.
    pub fn named_first(files: &[PathBuf]) -> Result<(Option<&Path>, &[PathBuf])> {
        match files {
            [first, rest @ ..] if is_model(first) => Ok((Some(first.as_path()), rest)),
            // A model's mistyped name is not to be taken for an image's.
            [first, ..]
                if !first.exists() && !DataConfig::is_name(first) && !is_standard(first) =>
            {
                Err(no_such_file(first))
            }
            _ => Ok((None, files)),
        }
    }

    /// Opens a run folder or a file for `pixelcnn COMMAND`, or the shipped model.
    pub fn open(path: Option<&Path>, command: &str) -> Result<Trained> {
        let Some(path) = path else {
            return unnamed();
        };
        #[cfg(feature = "pretrained")]
        if let Some(shipped) = Shipped::of_path(path)? {
            return Ok(Trained::exported(shipped.model()?));
        }
        if !path.exists() {
            return Err(no_such_file(path));
        }
        let error = match Run::open(path) {
            Ok(run) => return Ok(Trained::Run(run.into())),
            Err(error) => error,
        };
        // The header alone tells that a file is no checkpoint: nothing large is read twice.
        if error.is_other_file() {
            return match hub::read(path) {
                Err(FileError::NotACheckpoint { .. }) => Err(error.into()),
                model => Ok(Trained::exported(model?)),
            };
        }
        Err(match error {
            RunError::Checkpoint(error) => offer(error, path, |whole| {
                format!("pixelcnn {command} {}", quoted(whole))
            }),
            error => error.into(),
        })
    }

    /// A model that is known.
    pub fn exported(model: Model) -> Trained {
        let data = DataConfig::is_name(Path::new(&model.card.data)).then(|| DataConfig {
            data: model.card.data.clone(),
            ..DataConfig::default()
        });
        Trained::Exported(Exported { model, data }.into())
    }

    /// The model's shape.
    pub fn model(&self) -> &ModelConfig {
        match self {
            Trained::Run(run) => &run.state.config,
            Trained::Exported(exported) => &exported.model.config,
        }
    }

    /// Takes images of another height and width; says so if `aloud`.
    pub fn resize(&mut self, size: [usize; 2], aloud: bool) -> Result {
        let resized = self.model().resized(size);
        resized.validate()?;
        self.note_unless(|own| own == size || !aloud);
        match self {
            Trained::Run(run) => run.state.config = resized,
            Trained::Exported(exported) => exported.model.config = resized,
        }
        Ok(())
    }

    /// Says so where images are not of the size that the model was trained on.
    pub fn note_sizes(&self, data: &Dataset) {
        self.note_unless(|own| data.one_size().is_ok_and(|size| size == own));
    }

    fn note_unless(&self, fits: impl Fn([usize; 2]) -> bool) {
        let ModelConfig { height, width, .. } = *self.model();
        if !fits([height, width]) {
            note(format_args!(
                "the model was trained on images of {width}x{height}: of others it may know less"
            ));
        }
    }

    /// Optimizer steps taken.
    pub fn step(&self) -> u64 {
        match self {
            Trained::Run(run) => run.state.step,
            Trained::Exported(exported) => exported.model.card.step,
        }
    }

    /// What the parameters are: averaged or raw.
    pub fn kind(&self, raw: bool) -> &'static str {
        let averaged = match self {
            Trained::Run(_) => !raw,
            Trained::Exported(exported) => exported.model.card.averaged,
        };
        if averaged { "averaged" } else { "raw" }
    }

    /// Checks that the model gives images a likelihood, for `pixelcnn COMMAND`.
    pub fn expect_likelihood_of_images(&self, command: &str) -> Result {
        match self.model().nr_codes {
            0 => Ok(EvaluatorError::unless_likelihood(self.model())?),
            _ => Err(format!(
                "the model is one of codes: `pixelcnn {command}` takes models of images alone"
            )
            .into()),
        }
    }

    /// The averaged parameters, or the raw ones.
    pub fn parameters(&self, raw: bool) -> Result<&[Vec<f32>]> {
        match self {
            Trained::Run(run) if raw => Ok(&run.state.parameters),
            Trained::Run(run) => Ok(&run.state.average),
            Trained::Exported(_) if raw => {
                Err("--raw: the model has one set of weights: leave it out".into())
            }
            Trained::Exported(exported) => Ok(&exported.model.weights),
        }
    }

    /// The model with its averaged parameters, or those that it has.
    pub fn averaged(&self) -> Model {
        match self {
            Trained::Run(run) => Model {
                config: run.state.config.clone(),
                weights: run.state.average.clone(),
                card: run.card(false),
            },
            Trained::Exported(exported) => exported.model.clone(),
        }
    }

    /// The same, without the rest of a run.
    pub fn into_model(self) -> Model {
        match self {
            Trained::Run(run) => run.into_model(),
            Trained::Exported(exported) => exported.model,
        }
    }

    /// The model with its averaged parameters, or those that it has, to code pictures with.
    pub fn coder(&self) -> Result<CodingModel> {
        Ok(CodingModel::new(self.model(), self.parameters(false)?)?)
    }

    /// The network with its averaged parameters, or with the raw ones.
    pub fn network(&self, raw: bool, device: &Device) -> Result<Network> {
        let parameters = self.parameters(raw)?;
        Ok(Network::new(self.model(), parameters, device)?)
    }

    /// The data that it was trained on.
    pub fn data(&self) -> Option<&DataConfig> {
        match self {
            Trained::Run(run) => run.config.as_ref().map(|config| &config.data),
            Trained::Exported(exported) => exported.data.as_ref(),
        }
    }

    /// The data that the flags name, or else those that it was trained on.
    pub fn data_or(&self, flags: &DataFlags) -> Result<DataConfig> {
        let mut data = match self.data() {
            Some(data) => data.clone(),
            None if flags.name_data() => DataConfig::default(),
            None => return Err("what it was trained on is not known here: give --data".into()),
        };
        flags.apply(&mut data);
        data.codes = self.model().nr_code_maps();
        Ok(data)
    }

    /// Whether these are the data that it was trained on, wherever they are called so from.
    pub fn is_own(&self, data: &DataConfig) -> bool {
        let place = |data: &DataConfig| Path::new(&data.data).canonicalize().ok();
        self.data().is_some_and(|own| {
            own.data == data.data || place(own).is_some_and(|own| Some(own) == place(data))
        })
    }

    /// Opens the images to be measured: those of a split, if one is named; of the data that it was
    /// trained on the test split; of others that too where they have one, and else all. With them
    /// the split, where it is not all.
    pub fn open_measured(
        &self,
        data: &DataConfig,
        split: Option<Split>,
        listener: &mut Listener,
    ) -> Result<(Option<Split>, Dataset)> {
        let mut open = |data: &DataConfig, split| Dataset::open_with(data, split, listener);
        if split.is_some() || self.is_own(data) {
            let split = split.unwrap_or(Split::Test);
            return Ok((Some(split), open(data, split)?));
        }
        // With nothing held out, there are test images only where the data have a split of their
        // own; the others are all images.
        let all = DataConfig {
            held_out: 0.0,
            ..data.clone()
        };
        match open(&all, Split::Test) {
            Err(DataError::Empty { .. }) => Ok((None, open(&all, Split::Train)?)),
            opened => Ok((Some(Split::Test), opened?)),
        }
    }

    /// The names of its classes, as far as it knows them itself.
    pub fn known_class_names(&self) -> &[String] {
        match self {
            Trained::Run(run) => &run.state.class_names,
            Trained::Exported(exported) => &exported.model.card.class_names,
        }
    }

    /// The names of its classes, as it knows them or the data that it was trained on; none where they have none.
    pub fn class_names(&self) -> Result<Vec<String>> {
        let known = self.known_class_names();
        let (None, Some(data)) = (known.first(), self.data()) else {
            return Ok(known.to_vec());
        };
        let data = Dataset::open_with(data, Split::Test, &mut opening())?;
        Ok(match data.class_names() {
            names if names.len() == self.model().nr_classes => names.to_vec(),
            _ => Vec::new(),
        })
    }

    /// A class given by its number or by its name in the run's data.
    pub fn class(&self, class: &str) -> Result<u32> {
        let nr_classes = self.model().nr_classes;
        if nr_classes == 0 {
            return Err("--class: the model is not class-conditional: leave it out".into());
        }
        if let Ok(number) = class.parse::<u32>() {
            return match (number as usize) < nr_classes {
                true => Ok(number),
                false => Err(format!(
                    "--class {number}: the model has {nr_classes} classes: choose 0 to {}",
                    nr_classes - 1
                )
                .into()),
            };
        }
        let names = self.class_names()?;
        let number = names.iter().position(|name| name == class);
        number.map(|number| number as u32).ok_or_else(|| {
            let choice = match names.is_empty() {
                true => format!("a number from 0 to {}", nr_classes - 1),
                false => names.join(", "),
            };
            format!("--class {class}: there is no such class: choose {choice}").into()
        })
    }
}

/// Says which model it is, since none was named.
#[cfg(feature = "pretrained")]
fn unnamed() -> Result<Trained> {
    note("using the shipped CIFAR-10 model (name a run to use another)");
    Ok(Trained::exported(Shipped::Cifar10.model()?))
}

#[cfg(not(feature = "pretrained"))]
fn unnamed() -> Result<Trained> {
    Err("this program was built without a model: name a run: `pixelcnn train` makes one".into())
}

/// Whether a file is meant as a model: a run folder, a checkpoint, exported weights or a shipped one.
fn is_model(path: &Path) -> bool {
    #[cfg(feature = "pretrained")]
    if !matches!(Shipped::of_path(path), Ok(None)) {
        return true;
    }
    is_run(path) || path.extension().is_some_and(|ext| ext == "safetensors")
}

fn no_such_file(path: &Path) -> Box<dyn Error> {
    format!(
        "{}: no such file, run folder or checkpoint: check the name, or make a run with `pixelcnn \
         train`",
        path.display()
    )
    .into()
}

/// The checkpoints of a run.
pub fn checkpoints(run: &Path) -> Checkpoints {
    Checkpoints::new(run.join("checkpoints"))
}

/// Where the newest checkpoint is damaged, offers a whole one with the command that takes it.
pub fn offer(
    error: CheckpointError,
    run: &Path,
    command: impl Fn(&Path) -> String,
) -> Box<dyn Error> {
    let CheckpointError::Damaged {
        reason, previous, ..
    } = error
    else {
        return error.into();
    };
    let best = || Some(checkpoints(run).best()).filter(|best| TrainState::read(best).is_ok());
    match previous.or_else(best) {
        Some(whole) => format!("{reason}: take one that is whole: {}", command(&whole)).into(),
        None => format!("{reason}, and no other one is whole: begin a new run").into(),
    }
}
