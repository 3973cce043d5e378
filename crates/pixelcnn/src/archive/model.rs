//! The model that pictures are coded with.

use std::collections::{HashMap, hash_map};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use pixelcnn_core::codec::{Codec, Coding, Cut, Shape};
use pixelcnn_core::incremental::{Evaluator, EvaluatorError};
use pixelcnn_core::kernels::simd::{self, Level};
use pixelcnn_core::{ModelConfig, Nonlinearity};
use sha2::{Digest, Sha256};

use super::ArchiveError;
use crate::hex;
use crate::sample::{side_by_side, useful_threads};

/// Strips that are coded side by side, but those of one picture, if they fit into a gigabyte.
const SIDE_BY_SIDE: usize = 64;

/// Names a model: the first 16 bytes of a SHA-256 over its configuration and parameters.
///
/// Hashed are as 64-bit numbers height, width (both 0 where the model is to code pictures of any size), channels, `nr_resnet`, `nr_filters`,
/// `nr_logistic_mix`, the nonlinearity (0 `concat_elu`, 1 `elu`, 2 `relu`) and `nr_classes`, then
/// the [later settings](ModelConfig::later_settings), each name and number, then all
/// parameters in the layout's order as 32-bit floats; all of them little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ModelHash(pub [u8; 16]);

impl ModelHash {
    /// The hash of a model that codes pictures of any size.
    pub fn of_any_size(config: &ModelConfig, parameters: &[Vec<f32>]) -> ModelHash {
        ModelHash::of(&config.resized([0, 0]), parameters)
    }

    /// The hash of a model with its size.
    pub fn of(config: &ModelConfig, parameters: &[Vec<f32>]) -> ModelHash {
        let ModelConfig {
            height,
            width,
            channels,
            nr_resnet,
            nr_filters,
            nr_logistic_mix,
            nonlinearity,
            nr_classes,
            ..
        } = *config;
        let nonlinearity = match nonlinearity {
            Nonlinearity::ConcatElu => 0,
            Nonlinearity::Elu => 1,
            Nonlinearity::Relu => 2,
        };
        let mut hash = Sha256::new();
        for number in [
            height,
            width,
            channels,
            nr_resnet,
            nr_filters,
            nr_logistic_mix,
            nonlinearity,
            nr_classes,
        ] {
            hash.update((number as u64).to_le_bytes());
        }
        for (name, _, number) in config.later_settings() {
            hash.update(name);
            hash.update((number as u64).to_le_bytes());
        }
        for values in parameters.iter().flat_map(|values| values.chunks(4096)) {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            hash.update(bytes);
        }
        let mut first = [0; 16];
        first.copy_from_slice(&hash.finalize()[..16]);
        ModelHash(first)
    }
}

impl fmt::Display for ModelHash {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// A model to code pictures with, and its hash.
#[derive(Debug, Clone)]
pub struct CodingModel {
    /// For pictures of its own size.
    own: Evaluator,
    parameters: Arc<Vec<Vec<f32>>>,
    /// For strips, by their columns.
    strips: Arc<Mutex<HashMap<usize, Evaluator>>>,
    level: Level,
    hash: ModelHash,
    hash_with_size: ModelHash,
}

/// How the pictures of a block are cut and coded, by a model of so many channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cutting {
    /// Columns of a strip; none where each picture is one stream.
    pub columns: Option<usize>,
    pub channels: usize,
    /// Whether what a picture has taught so far counts beside the network.
    pub adapts: bool,
}

impl Cutting {
    pub fn coding(self) -> Coding {
        Coding {
            cut: match self.columns {
                None => Cut::Whole,
                Some(_) => Cut::Strips,
            },
            adapts: self.adapts,
        }
    }

    /// Height and width of the model that codes a picture.
    fn size(self, shape: &Shape) -> [usize; 2] {
        match self.columns {
            None => [shape.height, shape.width],
            Some(columns) => [1, columns],
        }
    }

    fn strips(self, shape: &Shape) -> usize {
        self.columns.map_or(1, |columns| shape.strips(columns))
    }

    /// Streams of a picture.
    pub fn streams(self, shape: &Shape) -> usize {
        self.columns.map_or(1, |columns| shape.count_tiles(columns))
    }

    /// Rows that go by until a picture is done.
    fn rows(self, shape: &Shape) -> usize {
        self.columns
            .map_or(shape.height, |columns| shape.rows(columns))
    }
}

impl CodingModel {
    /// The model with these `parameters`, in the layout's order.
    ///
    /// # Errors
    /// If they are not those of the configuration.
    pub fn new(config: &ModelConfig, parameters: &[Vec<f32>]) -> Result<Self, EvaluatorError> {
        EvaluatorError::unless_likelihood_of_images(config)?;
        Ok(CodingModel {
            own: Evaluator::new(config, parameters)?,
            parameters: Arc::new(parameters.to_vec()),
            strips: Arc::default(),
            level: simd::level(),
            hash: ModelHash::of_any_size(config, parameters),
            hash_with_size: ModelHash::of(config, parameters),
        })
    }

    /// The same with the vector instructions chosen, which does not change a byte.
    pub fn at(self, level: Level) -> Self {
        CodingModel { level, ..self }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        self.own.config()
    }

    /// The model's hash: of pictures of any size.
    pub fn hash(&self) -> ModelHash {
        self.hash
    }

    /// Its hash as version 1 has it, of pictures of its own size.
    pub(super) fn hash_with_size(&self) -> ModelHash {
        self.hash_with_size
    }

    fn evaluator(&self, cutting: Cutting, size: [usize; 2]) -> Result<Evaluator, EvaluatorError> {
        let config = self.config();
        if size == [config.height, config.width] {
            return Ok(self.own.clone());
        }
        let resized = || Evaluator::new(&config.resized(size), &self.parameters);
        if cutting.columns.is_none() {
            return resized();
        }
        let mut strips = self.strips.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(match strips.entry(size[1]) {
            hash_map::Entry::Occupied(entry) => entry.get().clone(),
            hash_map::Entry::Vacant(entry) => entry.insert(resized()?).clone(),
        })
    }

    /// Does something with all layers of pictures, those side by side that are alike: the codec for each
    /// batch and their numbers. `progress` is told the share that is done.
    fn in_batches(
        &self,
        cutting: Cutting,
        shapes: &[Shape],
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
        mut code: impl FnMut(&Codec, &[usize], Rows) -> Result<(), ArchiveError>,
    ) -> Result<(), ArchiveError> {
        let work = |shape: &Shape| (cutting.rows(shape) * cutting.strips(shape)) as f64;
        let total: f64 = shapes.iter().map(work).sum();
        let mut order: Vec<usize> = (0..shapes.len()).collect();
        // The tallest last: they are taken from the end.
        let rank = |&layer: &usize| (cutting.size(&shapes[layer]), cutting.rows(&shapes[layer]));
        order.sort_by_key(rank);
        let mut done = 0.0;
        while let Some(tallest) = order.pop() {
            let first = &shapes[tallest];
            let evaluator = self.evaluator(cutting, cutting.size(first))?;
            let most = side_by_side(&evaluator, SIDE_BY_SIDE);
            let mut strips = cutting.strips(first);
            let mut batch = vec![tallest];
            while let Some(layer) = order.pop_if(|layer| {
                let shape = &shapes[*layer];
                cutting.size(shape) == cutting.size(first)
                    && strips + cutting.strips(shape) <= most
                    // So that threads have something to do up to the end.
                    && 2 * cutting.rows(shape) > cutting.rows(first)
            }) {
                strips += cutting.strips(&shapes[layer]);
                batch.push(layer);
            }
            batch.sort_unstable();
            let codec = Codec {
                threads: useful_threads(&evaluator, strips),
                evaluator,
                level: self.level,
            };
            let here: f64 = batch.iter().map(|&layer| work(&shapes[layer])).sum();
            let mut share = |row: usize, rows: usize| {
                progress((done + here * row as f64 / rows as f64) / total)
            };
            code(&codec, &batch, &mut share)?;
            done += here;
        }
        Ok(())
    }

    /// Encodes layers of pictures: of each its streams.
    pub(super) fn encode(
        &self,
        cutting: Cutting,
        layers: &[(Shape, Vec<u8>)],
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<Vec<u8>>>, ArchiveError> {
        let shapes: Vec<Shape> = layers.iter().map(|(shape, _)| *shape).collect();
        let mut streams = vec![Vec::new(); layers.len()];
        self.in_batches(cutting, &shapes, progress, |codec, batch, rows| {
            let given = batch
                .iter()
                .map(|&layer| (shapes[layer], &layers[layer].1[..]));
            let given: Vec<(Shape, &[u8])> = given.collect();
            let encoded = codec.encode_pictures(cutting.coding(), &given, rows)?;
            for (&layer, encoded) in batch.iter().zip(encoded) {
                streams[layer] = encoded;
            }
            Ok(())
        })?;
        Ok(streams)
    }

    /// Decodes layers of pictures; `stream` is asked for each layer's tiles.
    pub(super) fn decode(
        &self,
        cutting: Cutting,
        shapes: &[Shape],
        stream: &mut dyn FnMut(usize, usize) -> Option<Vec<u8>>,
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Vec<Option<Vec<u8>>>, ArchiveError> {
        let mut layers = vec![None; shapes.len()];
        self.in_batches(cutting, shapes, progress, |codec, batch, rows| {
            let given: Vec<Shape> = batch.iter().map(|&layer| shapes[layer]).collect();
            let mut stream = |number: usize, tile| stream(batch[number], tile);
            let decoded = codec.decode_pictures(cutting.coding(), &given, &mut stream, rows)?;
            for (&layer, decoded) in batch.iter().zip(decoded) {
                layers[layer] = decoded;
            }
            Ok(())
        })?;
        Ok(layers)
    }
}

/// Is told the rows that are done of those that there are.
type Rows<'a> = &'a mut dyn FnMut(usize, usize) -> ControlFlow<()>;
