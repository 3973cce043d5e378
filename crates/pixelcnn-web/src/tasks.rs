//! What the room does for requests: drawing, measuring, and all else, one at a time.

use std::sync::Arc;

use pixelcnn::complete::Completion;
use pixelcnn::network::Batch;
use pixelcnn::sample::{Rows, Sampler, Sampling, Wanted};
use pixelcnn::score::LosslessFormat;
use rayon::prelude::*;
use tokio::sync::{mpsc, oneshot};

use crate::limits;
use crate::models::Loaded;
use crate::problem::{Problem, Result};
use crate::room::{Flag, Group, Work};

/// Pixels that are measured in one go, where one image has not more.
const AT_A_TIME: usize = 1 << 16;

/// Work of a request.
pub enum Task {
    /// Images are drawn.
    Draw(Draw),
    /// Images are measured.
    Measure(Measure),
    /// Something that goes by itself.
    Alone(Alone),
}

/// Something that goes by itself.
pub struct Alone {
    /// What is done.
    pub work: Box<dyn FnOnce(&Flag) + Send>,
    /// The number of the model whose network it takes.
    pub network: Option<u64>,
}

/// Images to draw.
pub struct Draw {
    /// By this model.
    pub model: Arc<Loaded>,
    /// Of this height and width.
    pub size: [usize; 2],
    /// These.
    pub what: What,
    /// Takes a row of all of them at a time, u8 [N, W, C].
    pub rows: mpsc::UnboundedSender<Result<Vec<u8>>>,
}

/// What is drawn.
pub enum What {
    /// Images from nothing.
    Sampling(Sampling),
    /// Images of which a part is known.
    Completion(Completion),
}

impl Draw {
    fn count(&self) -> usize {
        match &self.what {
            What::Sampling(sampling) => sampling.labels.len(),
            What::Completion(completion) => completion.labels.len() * completion.variants,
        }
    }

    fn images(&self) -> impl Iterator<Item = Wanted<'_>> {
        let config = self.model.config().resized(self.size);
        (0..self.count()).map(move |i| match &self.what {
            What::Sampling(sampling) => sampling.image(&config, i),
            What::Completion(completion) => {
                let variants = completion.variants;
                completion.variant(&config, i / variants, i % variants)
            }
        })
    }
}

/// Images to measure.
pub struct Measure {
    /// By this model.
    pub model: Arc<Loaded>,
    /// Of this height and width.
    pub size: [usize; 2],
    /// u8 [N, H, W, C].
    pub images: Vec<u8>,
    /// The class of each.
    pub labels: Vec<u32>,
    /// Takes what was found of each.
    pub done: oneshot::Sender<Result<Vec<Measured>>>,
}

/// What was found of an image.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Of each pixel the bits of all its channels together, [H, W].
    pub bits_per_pixel: Vec<f32>,
    /// Bits/dim of its file in each format.
    pub files: [f64; LosslessFormat::ALL.len()],
}

impl Work for Task {
    fn group(&self) -> Option<Group> {
        match self {
            Task::Draw(draw) => Some(("draw", draw.model.number, draw.size)),
            Task::Measure(measure) => Some(("measure", measure.model.number, measure.size)),
            Task::Alone(_) => None,
        }
    }

    fn share(&self) -> f64 {
        let (count, size, pixels) = match self {
            Task::Draw(draw) => (draw.count(), draw.size, limits::DRAWN),
            Task::Measure(measure) => (measure.labels.len(), measure.size, AT_A_TIME),
            Task::Alone(_) => return 1.0,
        };
        let images = count as f64 / limits::SIDE_BY_SIDE as f64;
        images.max((count * size[0] * size[1]) as f64 / pixels as f64)
    }

    fn needs(&self) -> Option<u64> {
        match self {
            Task::Draw(_) => None,
            Task::Measure(measure) => Some(measure.model.number),
            Task::Alone(alone) => alone.network,
        }
    }

    fn run(together: Vec<(Task, Arc<Flag>)>) {
        let (mut draws, mut measures) = (Vec::new(), Vec::new());
        for (task, flag) in together {
            match task {
                Task::Draw(draw) => draws.push((draw, flag)),
                Task::Measure(measure) => measures.push((measure, flag)),
                Task::Alone(alone) => (alone.work)(&flag),
            }
        }
        if !draws.is_empty() {
            draw(&draws);
        }
        if !measures.is_empty() {
            measure(measures);
        }
    }
}

/// Draws as many side by side as memory has room for.
fn draw(draws: &[(Draw, Arc<Flag>)]) {
    let (first, _) = &draws[0];
    let sampler = first.model.sampler(first.size);
    let sampler = sampler.and_then(|sampler| {
        let most = sampler.side_by_side();
        Ok((
            sampler,
            most.map_err(|error| Problem::ours(error.to_string()))?,
        ))
    });
    let (sampler, most) = match sampler {
        Ok(sampler) => sampler,
        Err(problem) => return tell(draws, &problem),
    };
    let mut rest = draws;
    while let Some((first, _)) = rest.first() {
        let mut images = 0;
        let mut fits = |(draw, _): &(Draw, _)| {
            images += draw.count();
            images <= most
        };
        let count = rest.iter().take_while(|draw| fits(draw)).count();
        if count == 0 {
            let wanted = first.count();
            let problem =
                format!("{wanted} images of this size: at most {most} are drawn at a time");
            tell(&rest[..1], &Problem::unfit(problem));
        }
        let (these, others) = rest.split_at(count.max(1));
        rest = others;
        if count > 0 {
            draw_together(&sampler, these);
        }
    }
}

fn tell(draws: &[(Draw, Arc<Flag>)], problem: &Problem) {
    for (draw, _) in draws {
        // Who is gone needs none.
        let _ = draw.rows.send(Err(problem.clone()));
    }
}

fn draw_together(sampler: &Sampler, draws: &[(Draw, Arc<Flag>)]) {
    let (first, _) = &draws[0];
    let images = draws.iter().flat_map(|(draw, _)| draw.images());
    let rows = match Rows::new(sampler, images) {
        Ok(rows) => rows,
        Err(error) => return tell(draws, &Problem::unfit(error.to_string())),
    };
    let length = first.size[1] * first.model.config().channels;
    for row in rows {
        let row = match row {
            Ok(row) => row,
            Err(error) => return tell(draws, &Problem::ours(error.to_string())),
        };
        let mut rest = &row[..];
        for (draw, _) in draws {
            let (own, others) = rest.split_at(draw.count() * length);
            rest = others;
            let _ = draw.rows.send(Ok(own.to_vec()));
        }
        if draws.iter().all(|(_, flag)| flag.go_on().is_break()) {
            return tell(draws, &Flag::stopped());
        }
    }
}

fn measure(measures: Vec<(Measure, Arc<Flag>)>) {
    let (model, size) = (Arc::clone(&measures[0].0.model), measures[0].0.size);
    let dims = size[0] * size[1] * model.config().channels;
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    for (measure, _) in &measures {
        images.extend(&measure.images);
        labels.extend(&measure.labels);
    }
    let at_a_time = (AT_A_TIME / (size[0] * size[1])).max(1);
    let is_wanted = || measures.iter().any(|(_, flag)| flag.go_on().is_continue());
    let found = model.with_network(size, |network| {
        let mut nats = Vec::new();
        let labels = labels.chunks(at_a_time);
        for (images, labels) in images.chunks(at_a_time * dims).zip(labels) {
            if !is_wanted() {
                return Err(Flag::stopped());
            }
            let batch = network.nats_per_pixel(Batch {
                images,
                labels,
                ..Batch::default()
            });
            nats.extend(batch.map_err(|error| Problem::unfit(error.to_string()))?);
        }
        Ok(nats)
    });
    let shape = [size[0], size[1], model.config().channels];
    let found = found.and_then(|nats| {
        let images = images.par_chunks_exact(dims);
        let images = images.zip(nats.par_chunks_exact(size[0] * size[1]));
        let measured = images.map(|(image, nats)| {
            let mut files = [0.0; LosslessFormat::ALL.len()];
            for format in LosslessFormat::ALL {
                let bits = format.bits_per_dim(image, shape);
                files[format as usize] = bits.map_err(|error| Problem::ours(error.to_string()))?;
            }
            let bits_per_pixel = nats.iter().map(|nats| nats / std::f32::consts::LN_2);
            Ok(Measured {
                bits_per_pixel: bits_per_pixel.collect(),
                files,
            })
        });
        measured.collect::<Result<Vec<Measured>>>()
    });
    match found {
        Ok(mut found) => {
            for (measure, _) in measures {
                let rest = found.split_off(measure.labels.len());
                let _ = measure.done.send(Ok(std::mem::replace(&mut found, rest)));
            }
        }
        Err(problem) => {
            for (measure, _) in measures {
                let _ = measure.done.send(Err(problem.clone()));
            }
        }
    }
}
