//! A trained model as Python has it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::{mem, process};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use numpy::PyArrayDyn;
use pixelcnn::archive::CodingModel;
use pixelcnn::classify::Classification;
use pixelcnn::complete::{self, Completion};
use pixelcnn::data::CodeMaps;
use pixelcnn::device::{self, Device};
use pixelcnn::evaluate::at_a_time;
use pixelcnn::incremental::EvaluatorError;
use pixelcnn::network::{Batch, EngineError, Layout, Network};
use pixelcnn::picture::{encode_png, grid};
use pixelcnn::sample::{self, Sampler, Sampling};
use pixelcnn::train::run::is_run;
use pixelcnn::weights::safetensors::Precision;
use pixelcnn::weights::{hub, port};
use pixelcnn::{ModelConfig, Shipped};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use serde::Serialize;

use crate::arrays::{Images, array, classes, code_maps, drawn, known, over_coarse};
use crate::distribution::{Distribution, mixtures};
use crate::errors;
use crate::work::{hold, work};
use crate::{archive, arrays};

/// Multiply-adds of a pass over the images that a notebook shows.
const SHOWN: u64 = 20_000_000_000;

/// A trained PixelCNN++: exact likelihoods of images, samples, completions, lossless compression.
///
/// Load one with :func:`pixelcnn.load`, or train one with :func:`pixelcnn.train`. Images are arrays of levels
/// from 0 to 255, uint8 [N, H, W, C]; a model takes images of any height and width. Of a model of codes they
/// are maps of codes, whole numbers [N, H, W]. Its methods run without Python's lock and can be stopped by
/// Ctrl-C.
#[pyclass(frozen, module = "pixelcnn")]
pub struct Model {
    pub model: pixelcnn::Model,
    device: Device,
    /// Its run's folder.
    run: Option<PathBuf>,
    ready: Mutex<(u32, Arc<Ready>)>,
    picture: OnceLock<Option<Vec<u8>>>,
}

/// The model as this process has made it ready for work. In one that was forked from another one the locks may
/// be held by threads that are not there.
#[derive(Default)]
struct Ready {
    network: Mutex<Option<Network>>,
    sampler: Mutex<Option<Sampler>>,
    coder: Mutex<Option<CodingModel>>,
}

/// All that a pickled model is made of again: its file, its device and its run.
type State<'py> = (Bound<'py, PyBytes>, String, Option<PathBuf>);

/// Opens a model.
///
/// Parameters
/// ----------
/// path : str or os.PathLike, optional
///     A run folder, of which the newest checkpoint is taken; a checkpoint; what :meth:`Model.save` wrote; a
///     checkpoint of the original TensorFlow code; a state dict of its PyTorch port (``.pth``); or
///     ``"shipped:cifar10"``, the model that comes with the package, of 32x32 images in RGB, which is also taken
///     where nothing is named.
/// device : str
///     ``"cpu"``, ``"cuda:N"`` or ``"wgpu:N"`` where the package was built for it, or ``"auto"``, the best
///     that is there.
///
/// Returns
/// -------
/// Model
///
/// Raises
/// ------
/// OSError, ValueError
///     Where there is no such file, or it is none of these or damaged.
#[pyfunction]
#[pyo3(signature = (path=None, *, device="auto"))]
pub fn load(py: Python<'_>, path: Option<PathBuf>, device: &str) -> PyResult<Model> {
    let device = device::parse(device).map_err(errors::value)?;
    let read = path.clone();
    let model = py.detach(|| match read {
        None => pixelcnn::Model::pretrained().map_err(errors::of),
        Some(path) => match Shipped::of_path(&path).map_err(errors::value)? {
            Some(shipped) => shipped.model().map_err(errors::of),
            None => pixelcnn::Model::open(&path).map_err(errors::of),
        },
    })?;
    Ok(Model::new(model, device, path.filter(|path| is_run(path))))
}

impl Model {
    /// A model, and the folder of its run.
    pub fn new(model: pixelcnn::Model, device: Device, run: Option<PathBuf>) -> Model {
        Model {
            model,
            device,
            run,
            ready: Mutex::new((process::id(), Arc::default())),
            picture: OnceLock::new(),
        }
    }

    fn ready(&self) -> Arc<Ready> {
        let mut held = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let own = process::id();
        if held.0 != own {
            mem::forget(mem::replace(&mut *held, (own, Arc::default())));
        }
        Arc::clone(&held.1)
    }

    /// Evaluates images, a few at a time.
    fn evaluate<T: Send>(
        &self,
        py: Python<'_>,
        images: &Images,
        labels: &[u32],
        each: impl Fn(&Network, Batch) -> Result<Vec<T>, EngineError> + Send + Sync,
    ) -> PyResult<Vec<T>> {
        let config = &self.model.config;
        EvaluatorError::unless_likelihood(config).map_err(errors::value)?;
        let (bytes, size) = (images.bytes(), images.size);
        let of_image = config.resized(size).bytes_per_image();
        let most = at_a_time(size, self.device.images_at_a_time());
        let ready = self.ready();
        let mut held = hold(py, &ready.network)?;
        let network = &mut *held;
        work(py, |stop| {
            let network = match network {
                Some(network) => network,
                None => network.insert(self.model.network(&self.device).map_err(errors::of)?),
            };
            if [network.config().height, network.config().width] != size {
                network.resize(size).map_err(errors::of)?;
            }
            let mut found = Vec::new();
            let batches = bytes.chunks(most * of_image);
            for (images, labels) in batches.zip(labels.chunks(most)) {
                let batch = Batch {
                    images,
                    labels,
                    ..Batch::default()
                };
                found.extend(each(network, batch).map_err(errors::of)?);
                if stop.flow().is_break() {
                    return Err(PyKeyboardInterrupt::new_err(()));
                }
            }
            Ok(found)
        })?
    }

    /// Images and the class of each.
    fn measured<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        classes: Option<&Bound<'py, PyAny>>,
        coarse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(Images<'py>, Vec<u32>)> {
        let config = &self.model.config;
        let images = Images::of(x, coarse, config)?;
        let labels = arrays::classes(classes, images.count, &self.model)?;
        let labels = labels.ok_or_else(|| {
            errors::value("the model is class-conditional: give classes, one for each image")
        })?;
        Ok((images, labels))
    }

    fn nats(
        &self,
        x: &Bound<'_, PyAny>,
        classes: Option<&Bound<'_, PyAny>>,
        coarse: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<(Vec<f64>, ModelConfig)> {
        let (images, labels) = self.measured(x, classes, coarse)?;
        let nats = self.evaluate(x.py(), &images, &labels, Network::nats_per_image)?;
        Ok((nats, self.model.config.resized(images.size)))
    }

    /// It, ready to draw images of a size.
    fn sampler(&self, py: Python<'_>, size: [usize; 2]) -> PyResult<Sampler> {
        let ready = self.ready();
        let mut held = hold(py, &ready.sampler)?;
        let config = self.model.config.resized(size);
        if let Some(sampler) = &*held
            && *sampler.config() == config
        {
            return Ok(sampler.clone());
        }
        let made = work(py, |_| {
            Sampler::new(&config, &self.model.weights, &self.device).map_err(errors::of)
        })??;
        Ok(held.insert(made).clone())
    }

    fn draw(&self, py: Python<'_>, sampler: &Sampler, sampling: &Sampling) -> PyResult<Vec<u8>> {
        let images = 0..sampling.labels.len();
        work(py, |stop| {
            sample::sample(sampler, sampling, images, &mut |_| stop.flow()).map_err(errors::of)
        })?
    }

    /// Does something with it as a coder of pictures.
    pub fn with_coder<T: Send>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&CodingModel, &crate::work::Stop) -> PyResult<T> + Send,
    ) -> PyResult<T> {
        let ready = self.ready();
        let mut held = hold(py, &ready.coder)?;
        let coder = &mut *held;
        work(py, |stop| {
            let coder = match coder {
                Some(coder) => coder,
                None => coder.insert(self.model.coder().map_err(errors::of)?),
            };
            f(coder, stop)
        })?
    }

    /// The classes of images to draw: those that are given, or each in turn.
    fn labels(&self, given: Option<&Bound<'_, PyAny>>, count: usize) -> PyResult<Vec<u32>> {
        let config = &self.model.config;
        let in_turn = || (0..config.nr_classes as u32).cycle().take(count).collect();
        Ok(classes(given, count, &self.model)?.unwrap_or_else(in_turn))
    }

    /// What it is, in a word or two: `name`, `value`.
    fn facts(&self) -> Vec<(&'static str, String)> {
        let (config, card) = (&self.model.config, &self.model.card);
        let ModelConfig {
            height,
            width,
            channels,
            ..
        } = *config;
        let measured = card.measured.as_ref().map(ToString::to_string);
        let images = match config.nr_codes {
            0 => ("images", format!("{height}x{width}x{channels}")),
            codes => ("maps", format!("{height}x{width} of {codes} codes")),
        };
        let size = format!("{} filters, {} blocks", config.nr_filters, config.nr_resnet);
        let mut facts = vec![
            (
                config.unit(),
                measured.unwrap_or_else(|| "not measured".into()),
            ),
            images,
            ("network", size),
            ("parameters", Layout::new(config).size().to_string()),
        ];
        if config.nr_classes > 0 {
            facts.push(("classes", config.nr_classes.to_string()));
        }
        facts.extend([
            ("data", card.data.clone()),
            ("steps", card.step.to_string()),
            ("weights", card.weights()),
            ("device", self.device.to_string()),
        ]);
        facts
    }

    /// A few samples as a PNG file.
    fn picture(&self, py: Python<'_>) -> PyResult<Option<&[u8]>> {
        let config = &self.model.config;
        if config.nr_codes > 0 {
            return Ok(None);
        }
        if self.picture.get().is_none() {
            let cost = Layout::new(config).multiply_adds.max(1);
            let count = (SHOWN / cost).clamp(1, 16) as usize;
            let sampling = Sampling {
                labels: self.labels(None, count)?,
                ..Sampling::of(count, 1)
            };
            let sampler = self.sampler(py, [config.height, config.width])?;
            let images = self.draw(py, &sampler, &sampling)?;
            let shape = [count, config.height, config.width, config.channels];
            let scale = (64 / config.height.max(config.width)).max(1);
            let picture = grid(&images, shape, 8, 1, scale).and_then(|grid| encode_png(&grid));
            // Whoever was first.
            let _ = self.picture.set(picture.ok());
        }
        Ok(self.picture.get().and_then(Option::as_deref))
    }
}

/// What can be written down as JSON, as Python's.
fn json<'py>(py: Python<'py>, what: &impl Serialize) -> PyResult<Bound<'py, PyAny>> {
    let text = serde_json::to_string(what).map_err(errors::value)?;
    py.import("json")?.call_method1("loads", (text,))
}

#[pymethods]
impl Model {
    /// Bits per dimension of each image: minus the logarithm to the base of 2 of its likelihood, divided by
    /// H W C.
    ///
    /// Parameters
    /// ----------
    /// x : uint8 [N, H, W, C]
    ///     Images; taken where they lie if they are contiguous. Of a model of codes, whole numbers [N, H, W].
    /// classes : int, str or int [N], optional
    ///     The class of each image, or the number or name of one for all; for class-conditional models alone.
    /// coarse : int [N, h, w], optional
    ///     The coarser maps of codes that the model is given, where it is.
    ///
    /// Returns
    /// -------
    /// float64 [N]
    #[pyo3(signature = (x, *, classes=None, coarse=None))]
    fn bits_per_dim<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        classes: Option<&Bound<'py, PyAny>>,
        coarse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        let (nats, config) = self.nats(x, classes, coarse)?;
        let bits: Vec<f64> = nats.iter().map(|&nats| config.bits_per_dim(nats)).collect();
        let shape = [bits.len()];
        array(x.py(), bits, &shape)
    }

    /// The log-likelihood of each image in nats, as density estimators of scikit-learn give it.
    ///
    /// Parameters
    /// ----------
    /// x, classes, coarse
    ///     As of :meth:`bits_per_dim`.
    ///
    /// Returns
    /// -------
    /// float64 [N]
    #[pyo3(signature = (x, *, classes=None, coarse=None))]
    fn score_samples<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        classes: Option<&Bound<'py, PyAny>>,
        coarse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        let (nats, _) = self.nats(x, classes, coarse)?;
        let shape = [nats.len()];
        array(x.py(), nats.into_iter().map(|nats| -nats).collect(), &shape)
    }

    /// The bits of each pixel, all its channels together, given the pixels before it.
    ///
    /// Parameters
    /// ----------
    /// x, classes, coarse
    ///     As of :meth:`bits_per_dim`.
    ///
    /// Returns
    /// -------
    /// float32 [N, H, W]
    #[pyo3(signature = (x, *, classes=None, coarse=None))]
    fn bits_per_pixel<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        classes: Option<&Bound<'py, PyAny>>,
        coarse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let (images, labels) = self.measured(x, classes, coarse)?;
        let nats = self.evaluate(x.py(), &images, &labels, Network::nats_per_pixel)?;
        let bits = nats.iter().map(|nats| nats / std::f32::consts::LN_2);
        let [height, width] = images.size;
        array(x.py(), bits.collect(), &[images.count, height, width])
    }

    /// What the model expects of each pixel, given the pixels before it.
    ///
    /// Parameters
    /// ----------
    /// x, classes, coarse
    ///     As of :meth:`bits_per_dim`.
    ///
    /// Returns
    /// -------
    /// Distribution
    ///     The mixture of logistics of every channel. Of a model of codes, the probabilities of all codes,
    ///     float32 [N, H, W, codes].
    #[pyo3(signature = (x, *, classes=None, coarse=None))]
    fn distribution<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        classes: Option<&Bound<'py, PyAny>>,
        coarse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, config) = (x.py(), &self.model.config);
        let (images, labels) = self.measured(x, classes, coarse)?;
        let (count, [height, width]) = (images.count, images.size);
        if config.nr_codes > 0 {
            let logits = self.evaluate(py, &images, &labels, Network::logits)?;
            let softmax = logits.chunks_exact(config.nr_codes).flat_map(|logits| {
                let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = logits.iter().map(|logit| (logit - most).exp()).collect();
                let sum: f32 = weights.iter().sum();
                weights.into_iter().map(move |weight| weight / sum)
            });
            let shape = [count, height, width, config.nr_codes];
            return Ok(array(py, softmax.collect(), &shape)?.into_any());
        }
        let found = self.evaluate(py, &images, &labels, |network, batch| {
            let logits = network.logits(batch)?;
            Ok(mixtures(config, batch.images, &logits))
        })?;
        let components = config.nr_logistic_mix;
        let shape = [count, height, width, config.channels, components];
        Ok(Bound::new(py, Distribution::new(py, shape, found)?)?.into_any())
    }

    /// The probability of each class for each image by Bayes' rule, all classes as likely beforehand.
    ///
    /// Parameters
    /// ----------
    /// x, coarse
    ///     As of :meth:`bits_per_dim`.
    ///
    /// Returns
    /// -------
    /// float64 [N, classes]
    #[pyo3(signature = (x, *, coarse=None))]
    fn predict_proba<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        coarse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        let config = &self.model.config;
        let nr_classes = config.nr_classes;
        if nr_classes == 0 {
            return Err(errors::value(
                "the model knows no classes: take one that was trained with classes",
            ));
        }
        let images = Images::of(x, coarse, config)?;
        let unused = vec![0; images.count];
        let of_image = config.resized(images.size).bytes_per_image();
        let nats = self.evaluate(x.py(), &images, &unused, |network, batch| {
            let count = batch.images.len() / of_image;
            let mut nats = vec![0.0; count * nr_classes];
            for class in 0..nr_classes {
                let labels = &vec![class as u32; count][..];
                let found = network.nats_per_image(Batch { labels, ..batch })?;
                for (image, found) in found.into_iter().enumerate() {
                    nats[image * nr_classes + class] = found;
                }
            }
            Ok(nats)
        })?;
        let found = Classification {
            nats,
            nr_classes,
            labels: Vec::new(),
        };
        array(x.py(), found.probabilities(), &[images.count, nr_classes])
    }

    /// Draws images, pixel by pixel.
    ///
    /// Parameters
    /// ----------
    /// n : int
    ///     How many; 16 if nothing is said.
    /// size : (int, int), optional
    ///     Their height and width; by default those that the model was trained on.
    /// classes : int, str or int [n], optional
    ///     The class of each, or the number or name of one for all, of a class-conditional model; by default
    ///     each class in turn.
    /// temperature : float
    ///     1 draws from the model, less than 1 likelier, smoother images.
    /// seed : int
    ///     Image i is a function of the seed and of i: the first ones stay the same when more are drawn.
    /// coarse : int [n, h, w], optional
    ///     The coarser maps that a model of codes is given, where it is: one map is drawn for each, whatever `n`
    ///     says.
    ///
    /// Returns
    /// -------
    /// uint8 [n, H, W, C]
    ///     Of a model of codes uint16 [n, H, W].
    #[pyo3(signature = (n=None, *, size=None, classes=None, temperature=1.0, seed=1, coarse=None))]
    #[allow(clippy::too_many_arguments)]
    fn sample<'py>(
        &self,
        py: Python<'py>,
        n: Option<i64>,
        size: Option<[i64; 2]>,
        classes: Option<&Bound<'py, PyAny>>,
        temperature: f32,
        seed: i64,
        coarse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let config = &self.model.config;
        expect_temperature(temperature)?;
        let size = match size {
            Some([height, width]) => [
                errors::count("size", height)?,
                errors::count("size", width)?,
            ],
            None => [config.height, config.width],
        };
        config.resized(size).validate().map_err(errors::value)?;
        let mut n = errors::count("n", n.unwrap_or(16))?;
        errors::bytes_of(&[n, config.resized(size).bytes_per_image().max(4)])?;
        let mut given = Vec::new();
        if config.nr_coarse_codes > 0 || coarse.is_some() {
            n = coarse.map_or(Ok(n), |maps| Ok::<_, PyErr>(code_maps(maps)?.shape[0]))?;
            let own = CodeMaps {
                shape: [n, size[0], size[1]],
                codes: vec![0; n * size[0] * size[1]],
            };
            given = over_coarse(&own, coarse, config)?;
        }
        let sampling = Sampling {
            labels: self.labels(classes, n)?,
            temperature,
            seed: errors::count("seed", seed)? as u64,
            coarse: given,
        };
        let sampler = self.sampler(py, size)?;
        let images = self.draw(py, &sampler, &sampling)?;
        drawn(py, sampler.config(), &[n], images)
    }

    /// Completes images of which a part is known: each other pixel is drawn given all pixels before it, row by
    /// row. The model cannot look ahead: what is known stays as it is, yet tells those before it nothing.
    ///
    /// Parameters
    /// ----------
    /// x : uint8 [N, H, W, C]
    ///     Images, of which only what is known is looked at.
    /// mask : bool [H, W]
    ///     True where a pixel is known, in all of them alike.
    /// variants : int
    ///     How many times each image is completed.
    /// classes, temperature, coarse
    ///     As of :meth:`sample`.
    /// seed : int
    ///     Variant k of image i is a function of the seed, i and k.
    ///
    /// Returns
    /// -------
    /// uint8 [N, variants, H, W, C]
    ///     Of a model of codes uint16 [N, variants, H, W].
    #[pyo3(signature = (x, mask, variants=1, *, classes=None, temperature=1.0, seed=1, coarse=None))]
    #[allow(clippy::too_many_arguments)]
    fn complete<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        mask: &Bound<'py, PyAny>,
        variants: i64,
        classes: Option<&Bound<'py, PyAny>>,
        temperature: f32,
        seed: i64,
        coarse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, config) = (x.py(), &self.model.config);
        expect_temperature(temperature)?;
        let images = Images::of(x, coarse, config)?;
        let variants = errors::count("variants", variants)?;
        errors::bytes_of(&[images.bytes().len(), variants])?;
        let completion = Completion {
            images: images.bytes().to_vec(),
            known: known(mask, images.size)?,
            labels: self.labels(classes, images.count)?,
            variants,
            temperature,
            seed: errors::count("seed", seed)? as u64,
        };
        let sampler = self.sampler(py, images.size)?;
        let found = work(py, |stop| {
            complete::complete(&sampler, &completion, &mut |_| stop.flow()).map_err(errors::of)
        })??;
        drawn(py, sampler.config(), &[images.count, variants], found)
    }

    /// Compresses pictures without loss: the bytes of a ``.pxc`` file, which ``pixelcnn decompress`` takes too.
    ///
    /// Parameters
    /// ----------
    /// images : uint8 [N, H, W, C], or a list or dict of arrays and bytes
    ///     Pictures of any sizes as arrays, uint8 [H, W, 3], [H, W, 1] or [H, W], or files as bytes: of PNG files
    ///     and the like the pixels are kept with all that says how they are shown, whatever else as it is. A dict
    ///     has their names; without them they are called by their numbers.
    ///
    /// Returns
    /// -------
    /// bytes
    #[pyo3(signature = (images, *, classes=None))]
    fn compress<'py>(
        &self,
        images: &Bound<'py, PyAny>,
        classes: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let mut items = archive::items(images)?;
        let labels = arrays::classes(classes, items.len(), &self.model)?;
        let labels = labels.ok_or_else(|| {
            errors::value("the model is class-conditional: give classes, one for each picture")
        })?;
        for (item, class) in items.iter_mut().zip(labels) {
            item.class = class;
        }
        let file = self.with_coder(images.py(), |coder, stop| {
            pixelcnn::archive::compress(coder, items, &mut |_| stop.flow()).map_err(errors::of)
        })?;
        Ok(PyBytes::new(images.py(), &file))
    }

    /// Decompresses all that is in a ``.pxc`` file that was made with this model, or with one that is in the file
    /// or comes with the package.
    ///
    /// Parameters
    /// ----------
    /// data : bytes
    ///     The file's.
    /// names : bool
    ///     Whether to give a dict, by their names.
    ///
    /// Returns
    /// -------
    /// list of arrays and bytes
    ///     Pictures as uint8 (of 16 bits uint16) [H, W, C], grey or red, green and blue, then alpha where there
    ///     is any; other files as bytes. With `names` a dict of these.
    ///
    /// Raises
    /// ------
    /// ValueError
    ///     Where it is of a model that is none of these, or anything of it is damaged.
    #[pyo3(signature = (data, *, names=false))]
    fn decompress<'py>(
        &self,
        py: Python<'py>,
        data: &Bound<'py, PyAny>,
        names: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let data = archive::file(data)?;
        let data = data.ok_or_else(|| errors::of_type("an archive is bytes"))?;
        archive::decompress(self, py, &data, names)
    }

    /// Writes ``model.safetensors``, ``config.json`` and a model card to a folder, as model hubs have them.
    ///
    /// Parameters
    /// ----------
    /// path : str or os.PathLike
    ///     The folder; it is made if need be.
    /// half : bool
    ///     In half precision: half the size, and next to no worse.
    /// overwrite : bool
    ///     Whether files of these names that are there already may be overwritten.
    #[pyo3(signature = (path, *, half=false, overwrite=false))]
    fn save(&self, py: Python<'_>, path: PathBuf, half: bool, overwrite: bool) -> PyResult<()> {
        for name in ["model.safetensors", "config.json", "README.md"] {
            let file = path.join(name);
            if !overwrite && file.exists() {
                return Err(pyo3::exceptions::PyFileExistsError::new_err(format!(
                    "{}: it is there already: choose another folder, or overwrite=True",
                    file.display()
                )));
            }
        }
        let card = self.model.card.clone();
        let precision = if half {
            Precision::Half
        } else {
            card.precision
        };
        let card = card.in_precision(precision);
        let model = &self.model;
        py.detach(|| hub::export(&path, &model.config, &model.weights, &card))
            .map_err(errors::of)
    }

    /// The parameters, the averaged ones of a run, by name.
    ///
    /// Parameters
    /// ----------
    /// names : {"original", "port"}
    ///     The names and layouts of the original TensorFlow code, or those of its PyTorch port
    ///     (pclucas14/pixel-cnn-pp), whose ``load_state_dict`` takes them once they are tensors.
    ///
    /// Returns
    /// -------
    /// dict of str to float32 arrays
    #[pyo3(signature = (names="original"))]
    fn state_dict<'py>(&self, py: Python<'py>, names: &str) -> PyResult<Bound<'py, PyDict>> {
        let (config, weights) = (&self.model.config, &self.model.weights);
        let found = PyDict::new(py);
        match names {
            "original" => {
                let layout = Layout::new(config);
                for (parameter, values) in layout.parameters.iter().zip(weights) {
                    let values = array(py, values.clone(), &parameter.shape)?;
                    found.set_item(&parameter.name, values)?;
                }
            }
            "port" => {
                for (name, tensor) in port::from_original(config, weights).map_err(errors::of)? {
                    found.set_item(name, array(py, tensor.values, &tensor.shape)?)?;
                }
            }
            other => {
                return Err(errors::value(format!(
                    "names={other:?}: choose \"original\" or \"port\""
                )));
            }
        }
        Ok(found)
    }

    /// Its shape and settings: ``height``, ``nr_filters`` and so on, as in a run's ``config.toml``.
    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json(py, &self.model.config)
    }

    /// How it came about, and how good it is.
    #[getter]
    fn card<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        json(py, &self.model.card)
    }

    /// The folder of its run, where it has one.
    #[getter]
    fn run(&self) -> Option<PathBuf> {
        self.run.clone()
    }

    /// Where it runs, as :func:`load` takes it.
    #[getter]
    fn device(&self) -> String {
        self.device.to_string()
    }

    fn __repr__(&self) -> String {
        let facts = self.facts();
        let facts = facts.iter().filter(|(name, _)| *name != "weights");
        let facts = facts.map(|(name, value)| format!("{name} {value}"));
        let facts: Vec<String> = facts.collect();
        format!(
            "<pixelcnn.Model {}: {}>",
            self.model.card.name,
            facts.join(", ")
        )
    }

    /// What a notebook shows: the card, and samples.
    fn _repr_html_(&self, py: Python<'_>) -> PyResult<String> {
        let rows = self.facts();
        let rows = rows.iter().map(|(name, value)| {
            format!(
                "<tr><th style=\"text-align:left\">{name}</th><td style=\"text-align:left\">{}</td></tr>",
                escaped(value)
            )
        });
        let picture = self.picture(py)?.map(|png| {
            format!(
                "<img alt=\"samples\" style=\"image-rendering:pixelated\" \
                 src=\"data:image/png;base64,{}\">",
                BASE64.encode(png)
            )
        });
        Ok(format!(
            "<div><b>{}</b><table>{}</table>{}</div>",
            escaped(&self.model.card.name),
            rows.collect::<String>(),
            picture.unwrap_or_default()
        ))
    }

    /// The same without its run.
    fn _without_run(&self) -> Model {
        Model::new(self.model.clone(), self.device, None)
    }

    /// For `pickle` and `copy`.
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, State<'py>)> {
        let bytes = self.model.to_bytes().map_err(errors::of)?;
        let make = py.get_type::<Model>().getattr("_of_bytes")?;
        let bytes = PyBytes::new(py, &bytes);
        Ok((make, (bytes, self.device.to_string(), self.run.clone())))
    }

    #[staticmethod]
    fn _of_bytes(bytes: &[u8], device: &str, run: Option<PathBuf>) -> PyResult<Model> {
        let device = device::parse(device).map_err(errors::value)?;
        let model = pixelcnn::Model::from_bytes(bytes).map_err(errors::of)?;
        Ok(Model::new(model, device, run))
    }
}

fn expect_temperature(temperature: f32) -> PyResult<()> {
    match temperature.is_finite() && temperature > 0.0 {
        true => Ok(()),
        false => Err(errors::value(format!(
            "temperature {temperature}: it must be above 0"
        ))),
    }
}

/// Text as HTML has it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
