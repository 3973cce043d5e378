//! The paper, plainly, in double precision: one loop inside the other, image by image, and nothing
//! shared with the [plan](crate::plan) or the [kernels](crate::kernels) but which values dropout
//! drops. It judges every engine, and is as slow as it looks.
//!
//! A [`Pass`] computes every map and writes down where it came from; the gradients are then found
//! going back over those notes.

#[cfg(test)]
mod plan;
#[cfg(test)]
mod tests;

use crate::config::{ModelConfig, Nonlinearity};
use crate::engine::{Batch, EngineError};
use crate::kernels::pointwise::Dropout;
use crate::kernels::weight_norm::WeightNorm;
use crate::likelihood::reference::{energy, nats, nats_of_code};
use crate::likelihood::{Mixture, NOISE, Noise, SAMPLES, from_level};
use crate::network::{GatedResnet, Head, Layer, LayerKind, Layout, Pass, pixelcnn};

/// What a batch gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The mixture's parameters \[N, H, W, [`ModelConfig::output_channels`]\].
    pub logits: Vec<f64>,
    /// The feature maps that the original records, in its order, each \[N, rows, columns, filters\].
    pub feature_maps: Vec<Vec<f64>>,
    /// Nats of every image.
    pub nats: Vec<f64>,
    /// Of the summed nats, in the [`Layout`]'s order.
    pub gradients: Vec<Vec<f64>>,
}

/// Runs the network of `parameters`, in the [`Layout`]'s order, forward and backward over a batch.
///
/// # Errors
/// Where the batch is not the model's.
///
/// # Panics
/// If the parameters are not the model's.
pub fn run(
    config: &ModelConfig,
    parameters: &[Vec<f64>],
    batch: Batch,
    dropout: Option<Dropout>,
) -> Result<Outcome, EngineError> {
    run_in_strips(config, parameters, batch, dropout, usize::MAX)
}

/// As [`run`], where no pixel sees beyond the right edge of its strip of so many columns.
///
/// # Errors
/// As [`run`].
///
/// # Panics
/// As [`run`].
pub fn run_in_strips(
    config: &ModelConfig,
    parameters: &[Vec<f64>],
    batch: Batch,
    dropout: Option<Dropout>,
    columns: usize,
) -> Result<Outcome, EngineError> {
    let layout = Layout::new(config).parameters;
    let zeros = layout.iter().map(|parameter| vec![0.0; parameter.len()]);
    let mut outcome = Outcome {
        logits: Vec::new(),
        feature_maps: Vec::new(),
        nats: Vec::new(),
        gradients: zeros.collect(),
    };
    for image in 0..batch.len(config)? {
        let bytes = config.bytes_per_image();
        let x = input(config, &batch.images[image * bytes..][..bytes]);
        let mut tape = Tape {
            config,
            parameters,
            conditions: batch.conditions(config, image).collect(),
            dropout: dropout.map(|dropout| (dropout, image)),
            columns,
            maps: Vec::new(),
            recorded: Vec::new(),
        };
        let image = tape.note(Origin::Image, x.clone());
        let logits = pixelcnn(config, &mut tape, image);
        let recorded = tape.recorded.iter().map(|&map| &tape.maps[map].1.values);
        outcome.feature_maps.resize(recorded.len(), Vec::new());
        for (all, map) in outcome.feature_maps.iter_mut().zip(recorded) {
            all.extend(map);
        }
        let values = &tape.maps[logits].1.values;
        outcome.logits.extend(values);
        let (last, total, gradient) = tape.judged(&x, logits);
        outcome.nats.push(total);
        tape.backward(last, gradient, &mut outcome.gradients);
    }
    Ok(outcome)
}

/// An image as the network sees it: levels scaled to \[-1, 1\], or codes as one-hot vectors, those of
/// the coarser map behind the others.
fn input(config: &ModelConfig, image: &[u8]) -> Map {
    let values: Vec<f64> = match config.nr_codes {
        0 => image
            .iter()
            .map(|&level| from_level(level).into())
            .collect(),
        _ => {
            let counts = [config.nr_codes, config.nr_coarse_codes];
            let pixels = image.chunks(config.bytes_per_pixel());
            let one_hot = |pixel: &'_ [u8], map: usize, count: usize| {
                let code = (count > 0).then(|| ModelConfig::code(pixel, map));
                (0..count).map(move |k| f64::from(u8::from(Some(k) == code)))
            };
            let pixels = pixels.flat_map(|pixel| {
                let [own, coarse] = [0, 1].map(|map| one_hot(pixel, map, counts[map]));
                own.chain(coarse)
            });
            pixels.collect()
        }
    };
    let channels = values.len() / (config.height * config.width);
    Map::new(config, 0, channels, values)
}

/// Nats of an image, and their gradient by the logits, or by samples before their tanh: a central difference for each, within 1e-7 of
/// the slope.
fn likelihood(config: &ModelConfig, x: &Map, logits: &[f64]) -> (f64, Vec<f64>) {
    const STEP: f64 = 1e-6;
    let nats = |x: &[f64], logits: &[f64]| match config.nr_codes {
        _ if config.energy_distance => energy(x, logits),
        0 => nats(Mixture::of(config), x, logits),
        codes => {
            let code = x[..codes].iter().position(|&x| x == 1.0);
            nats_of_code(code.expect("a one"), logits)
        }
    };
    let (mut total, mut gradient) = (0.0, Vec::new());
    let width = logits.len() / (x.size[0] * x.size[1]);
    for (x, logits) in x.pixels().zip(logits.chunks(width)) {
        total += nats(x, logits);
        for i in 0..logits.len() {
            let moved = |by: f64| {
                let mut logits = logits.to_vec();
                logits[i] += by;
                nats(x, &logits)
            };
            gradient.push((moved(STEP) - moved(-STEP)) / (2.0 * STEP));
        }
    }
    (total, gradient)
}

/// A feature map of one image: \[rows, columns, channels\].
#[derive(Debug, Clone)]
struct Map {
    /// How often the resolution is halved.
    scale: usize,
    size: [usize; 2],
    channels: usize,
    values: Vec<f64>,
}

impl Map {
    fn new(config: &ModelConfig, scale: usize, channels: usize, values: Vec<f64>) -> Map {
        let size = config.size_at(scale);
        assert_eq!(values.len(), size[0] * size[1] * channels);
        Map {
            scale,
            size,
            channels,
            values,
        }
    }

    /// A map of the same size.
    fn like(&self, channels: usize, values: Vec<f64>) -> Map {
        assert_eq!(values.len(), self.size[0] * self.size[1] * channels);
        Map {
            channels,
            values,
            ..*self
        }
    }

    fn pixels(&self) -> impl Iterator<Item = &[f64]> {
        self.values.chunks(self.channels)
    }

    /// A map of this size whose pixels are a function of this one's.
    fn map(&self, channels: usize, f: impl Fn(&[f64]) -> Vec<f64>) -> Map {
        self.like(channels, self.pixels().flat_map(f).collect())
    }
}

/// Where a map came from; numbers are those of maps.
enum Origin {
    Image,
    Ones(usize),
    /// The first channels.
    First(usize),
    Layer(Layer, usize),
    Bent(Nonlinearity, usize),
    /// Multiplied by these factors.
    Dropped(Vec<f64>, usize),
    /// x + a * sigmoid(b), for x and (a, b), to which its conditions add rows of `hw`.
    Gated(usize, usize, Option<usize>),
    /// Moved down and right.
    Shifted([usize; 2], usize),
    Sum(usize, usize),
    Concatenated(usize, usize),
    /// What so many heads see, of queries and of keys and values.
    Attended(usize, usize, usize),
}

struct Tape<'a> {
    config: &'a ModelConfig,
    parameters: &'a [Vec<f64>],
    /// Rows of the conditional weights.
    conditions: Vec<usize>,
    /// With the image's place in the batch.
    dropout: Option<(Dropout, usize)>,
    /// Of a strip.
    columns: usize,
    maps: Vec<(Origin, Map)>,
    recorded: Vec<usize>,
}

fn elu(x: f64) -> f64 {
    if x > 0.0 { x } else { x.exp_m1() }
}

fn elu_slope(x: f64) -> f64 {
    if x > 0.0 { 1.0 } else { x.exp() }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// A layer's weight `g V / ||V||`, with `V`'s place of each value \[taps, inputs, outputs\].
struct Weight {
    /// ||V|| of every output, floored.
    norms: Vec<f64>,
    /// Whether the floor decides it.
    floored: Vec<bool>,
    values: Vec<f64>,
    places: Vec<usize>,
}

impl Weight {
    fn new(layer: &Layer, v: &[f64], g: &[f64]) -> Weight {
        let (inputs, outputs) = (layer.inputs, layer.outputs);
        let mut places = Vec::new();
        for tap in 0..layer.window.taps() {
            for input in 0..inputs {
                for output in 0..outputs {
                    places.push(match layer.kind {
                        LayerKind::Deconv => (tap * outputs + output) * inputs + input,
                        LayerKind::Conv | LayerKind::Dense => {
                            (tap * inputs + input) * outputs + output
                        }
                    });
                }
            }
        }
        let mut squares = vec![0.0; outputs];
        for (i, place) in places.iter().enumerate() {
            squares[i % outputs] += v[*place].powi(2);
        }
        let floor = WeightNorm::of(layer).floor;
        let norms: Vec<f64> = squares
            .iter()
            .map(|square| square.max(floor).sqrt())
            .collect();
        let value = |(i, place): (usize, &usize)| g[i % outputs] * v[*place] / norms[i % outputs];
        Weight {
            values: places.iter().enumerate().map(value).collect(),
            floored: squares.iter().map(|square| *square <= floor).collect(),
            norms,
            places,
        }
    }
}

/// Calls `f` with every tap of a layer, and the pixels of its input and output that it joins; but where the
/// one that is read is in a strip of so many columns of the image to the right of the other's.
fn joined(
    layer: &Layer,
    [input, output]: [&Map; 2],
    columns: usize,
    f: &mut dyn FnMut(usize, [usize; 2]),
) {
    let fine_scale = layer.finer(input.scale, output.scale);
    let strip = |x: usize, scale: usize| x / (columns >> scale).max(1);
    let [fine, coarse] = [
        layer.finer(input.size, output.size),
        layer.finer(output.size, input.size),
    ];
    let step = layer.window.stride - 1;
    let ([kernel_h, kernel_w], [up, left]) = (layer.window.kernel, layer.window.offset);
    for y in 0..coarse[0] {
        for x in 0..coarse[1] {
            for tap in 0..kernel_h * kernel_w {
                let fine_y = (y * layer.window.stride + tap / kernel_w).checked_sub(up);
                let fine_x = (x * layer.window.stride + tap % kernel_w).checked_sub(left);
                let (Some(fine_y), Some(fine_x)) = (fine_y, fine_x) else {
                    continue;
                };
                let strips = [strip(fine_x, fine_scale), strip(x, fine_scale + step)];
                let seen = match layer.kind {
                    LayerKind::Deconv => strips[1] <= strips[0],
                    LayerKind::Conv | LayerKind::Dense => strips[0] <= strips[1],
                };
                if fine_y < fine[0] && fine_x < fine[1] && seen {
                    let (at_coarse, at_fine) = (y * coarse[1] + x, fine_y * fine[1] + fine_x);
                    f(
                        tap,
                        match layer.kind {
                            LayerKind::Deconv => [at_coarse, at_fine],
                            LayerKind::Conv | LayerKind::Dense => [at_fine, at_coarse],
                        },
                    );
                }
            }
        }
    }
}

impl Tape<'_> {
    fn note(&mut self, origin: Origin, map: Map) -> usize {
        self.maps.push((origin, map));
        self.maps.len() - 1
    }

    fn map(&self, map: usize) -> &Map {
        &self.maps[map].1
    }

    /// The nats of an image `x`, for which the network gives a map: the last map that they are computed from,
    /// and their gradient by it.
    fn judged(&mut self, x: &Map, output: usize) -> (usize, f64, Vec<f64>) {
        let last = match Layout::new(self.config).head {
            None => output,
            Some(head) => self.samples(&head, output),
        };
        let (total, gradient) = likelihood(self.config, x, &self.map(last).values);
        (last, total, gradient)
    }

    /// The samples that a head makes of features, before their tanh.
    fn samples(&mut self, head: &Head, features: usize) -> usize {
        let Map { size, .. } = *self.map(features);
        let pixels = size[0] * size[1];
        let (dropout, image) = self
            .dropout
            .map_or((None, 0), |(d, image)| (Some(d), image));
        let noise = Noise::of(dropout);
        let mut all = None;
        for sample in 0..SAMPLES {
            let values = (0..pixels).flat_map(|pixel| {
                let row = pixel * SAMPLES + sample;
                (0..NOISE).map(move |number| noise.at(image, pixels, row, number).into())
            });
            let drawn = self.map(features).like(NOISE, values.collect());
            let drawn = self.note(Origin::Image, drawn);
            let moved = self.layer(&head[0], &drawn);
            let mut map = self.add(features, moved);
            for layer in &head[1..] {
                let bent = self.bent(Nonlinearity::ConcatElu, map);
                map = self.layer(layer, &bent);
            }
            all = Some(all.map_or(map, |all| self.concat(&all, &map)));
        }
        all.expect("a sample at least")
    }

    fn weight(&self, layer: &Layer) -> Weight {
        let [v, g] = [0, 1].map(|k| &self.parameters[layer.parameter + k]);
        Weight::new(layer, v, g)
    }

    fn bent(&mut self, f: Nonlinearity, x: usize) -> usize {
        let bent = self.map(x).map(f.outputs(self.map(x).channels), |pixel| {
            let pixel = pixel.iter();
            match f {
                Nonlinearity::ConcatElu => {
                    let minus = pixel.clone().map(|x| elu(-x));
                    pixel.map(|x| elu(*x)).chain(minus).collect()
                }
                Nonlinearity::Elu => pixel.map(|x| elu(*x)).collect(),
                Nonlinearity::Relu => pixel.map(|x| x.max(0.0)).collect(),
            }
        });
        self.note(Origin::Bent(f, x), bent)
    }

    /// Dropout of a block's values: which it drops follows from their place in the whole batch.
    fn dropped(&mut self, block: &GatedResnet, x: usize) -> usize {
        let Some((dropout, image)) = self.dropout else {
            return x;
        };
        let map = self.map(x);
        let mut mask = vec![0.0f32; map.values.len()];
        Dropout {
            seed: dropout.seed.wrapping_add(block.number as u64),
            first: image * map.values.len(),
            ..dropout
        }
        .mask(&mut mask);
        let mask: Vec<f64> = mask.into_iter().map(f64::from).collect();
        let values = map.values.iter().zip(&mask).map(|(x, factor)| x * factor);
        let dropped = map.like(map.channels, values.collect());
        self.note(Origin::Dropped(mask, x), dropped)
    }

    /// a and b of a gate at every pixel, the conditions' biases added.
    fn gates(&self, c2: usize, hw: Option<usize>) -> Map {
        let channels = self.map(c2).channels;
        let mut bias = vec![0.0; channels];
        for row in self.conditions.iter().filter(|_| hw.is_some()) {
            let rows = hw.map_or(&[][..], |hw| &self.parameters[hw]);
            add(&mut bias, &rows[row * channels..][..channels]);
        }
        let biased = |pixel: &[f64]| pixel.iter().zip(&bias).map(|(c2, b)| c2 + b).collect();
        self.map(c2).map(channels, biased)
    }

    fn shifted(&mut self, by: [usize; 2], x: usize) -> usize {
        let Map { size, channels, .. } = *self.map(x);
        let mut values = Vec::new();
        for row in 0..size[0] {
            for column in 0..size[1] {
                match (row.checked_sub(by[0]), column.checked_sub(by[1])) {
                    (Some(y), Some(x_)) => {
                        let at = (y * size[1] + x_) * channels;
                        values.extend_from_slice(&self.map(x).values[at..at + channels]);
                    }
                    _ => values.extend(vec![0.0; channels]),
                }
            }
        }
        let shifted = self.map(x).like(channels, values);
        self.note(Origin::Shifted(by, x), shifted)
    }

    /// The shares in which a head of pixel `i` sees each pixel up to it: the softmax of the products of
    /// its query with their keys.
    fn shares(&self, heads: usize, head: usize, i: usize, q: usize, kv: usize) -> Vec<f64> {
        let (q, kv) = (self.map(q), self.map(kv));
        let width = q.channels / heads;
        let own = |map: &'_ Map, pixel: usize| {
            map.values[pixel * map.channels + head * width..][..width].to_vec()
        };
        let query = own(q, i);
        let products = (0..=i).map(|j| {
            let products = query.iter().zip(own(kv, j)).map(|(q, k)| q * k);
            products.sum::<f64>() / (width as f64).sqrt()
        });
        let products: Vec<f64> = products.collect();
        let most = products.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = products.iter().map(|product| (product - most).exp()).sum();
        let share = |product: &f64| (product - most).exp() / total;
        products.iter().map(share).collect()
    }

    /// Adds to `gradients` those of the parameters, where `gradient` is that by the map `last`; gives
    /// those by the maps that come from nowhere.
    fn backward(
        &self,
        last: usize,
        gradient: Vec<f64>,
        gradients: &mut [Vec<f64>],
    ) -> Vec<Vec<f64>> {
        let zeros = self.maps.iter().map(|(_, map)| vec![0.0; map.values.len()]);
        let mut by_map: Vec<Vec<f64>> = zeros.collect();
        by_map[last] = gradient;
        for (number, (origin, map)) in self.maps.iter().enumerate().rev() {
            let dy = std::mem::take(&mut by_map[number]);
            let channels = map.channels;
            match origin {
                Origin::Image => by_map[number] = dy,
                Origin::Ones(x) => {
                    let pixels = by_map[*x].chunks_mut(channels - 1);
                    for (dx, dy) in pixels.zip(dy.chunks(channels)) {
                        add(dx, &dy[..channels - 1]);
                    }
                }
                Origin::First(x) => {
                    let pixels = by_map[*x].chunks_mut(self.map(*x).channels);
                    for (dx, dy) in pixels.zip(dy.chunks(channels)) {
                        add(&mut dx[..channels], dy);
                    }
                }
                Origin::Layer(layer, x) => {
                    self.backward_layer(layer, [*x, number], &dy, &mut by_map[*x], gradients);
                }
                Origin::Bent(f, x) => {
                    let inputs = self.map(*x);
                    let count = inputs.channels;
                    for (pixel, x_pixel) in inputs.pixels().enumerate() {
                        for (i, &value) in x_pixel.iter().enumerate() {
                            let dy = |channel: usize| dy[pixel * channels + channel];
                            by_map[*x][pixel * count + i] += match f {
                                Nonlinearity::ConcatElu => {
                                    dy(i) * elu_slope(value) - dy(count + i) * elu_slope(-value)
                                }
                                Nonlinearity::Elu => dy(i) * elu_slope(value),
                                Nonlinearity::Relu => dy(i) * f64::from(u8::from(value > 0.0)),
                            };
                        }
                    }
                }
                Origin::Dropped(mask, x) => {
                    let through: Vec<f64> = dy.iter().zip(mask).map(|(dy, m)| dy * m).collect();
                    add(&mut by_map[*x], &through);
                }
                Origin::Gated(x, c2, hw) => {
                    add(&mut by_map[*x], &dy);
                    let gates = self.gates(*c2, *hw);
                    let pixels = dy.chunks(channels).zip(gates.pixels());
                    let d_c2: Vec<f64> = pixels
                        .flat_map(|(dy, gates)| {
                            let (a, b) = gates.split_at(channels);
                            let by_a = dy.iter().zip(b).map(|(dy, b)| dy * sigmoid(*b));
                            let slope = |b: f64| sigmoid(b) * sigmoid(-b);
                            let by_b = dy.iter().zip(a.iter().zip(b));
                            let by_b = by_b.map(|(dy, (a, b))| dy * a * slope(*b));
                            by_a.chain(by_b).collect::<Vec<f64>>()
                        })
                        .collect();
                    for (hw, row) in hw
                        .iter()
                        .flat_map(|hw| self.conditions.iter().map(move |row| (hw, row)))
                    {
                        let row = &mut gradients[*hw][row * 2 * channels..];
                        for d_c2 in d_c2.chunks(2 * channels) {
                            add(&mut row[..2 * channels], d_c2);
                        }
                    }
                    add(&mut by_map[*c2], &d_c2);
                }
                Origin::Shifted(by, x) => {
                    let [rows, columns] = map.size;
                    for row in by[0]..rows {
                        for column in by[1]..columns {
                            let from = (row * columns + column) * channels;
                            let to = ((row - by[0]) * columns + column - by[1]) * channels;
                            add(
                                &mut by_map[*x][to..to + channels],
                                &dy[from..from + channels],
                            );
                        }
                    }
                }
                Origin::Sum(x, y) => {
                    add(&mut by_map[*x], &dy);
                    add(&mut by_map[*y], &dy);
                }
                Origin::Concatenated(x, y) => {
                    let first = self.map(*x).channels;
                    for (pixel, dy) in dy.chunks(channels).enumerate() {
                        let (by_x, by_y) = dy.split_at(first);
                        for (map, by_part) in [(*x, by_x), (*y, by_y)] {
                            let at = pixel * by_part.len();
                            add(&mut by_map[map][at..at + by_part.len()], by_part);
                        }
                    }
                }
                Origin::Attended(heads, q, kv) => {
                    self.backward_attention(*heads, [*q, *kv], &dy, &mut by_map);
                }
            }
        }
        by_map
    }

    fn backward_attention(
        &self,
        heads: usize,
        [q, kv]: [usize; 2],
        dy: &[f64],
        by_map: &mut [Vec<f64>],
    ) {
        let channels = self.map(q).channels;
        let width = channels / heads;
        let scale = 1.0 / (width as f64).sqrt();
        let (queries, keys_values) = (&self.map(q).values, &self.map(kv).values);
        for (head, i) in (0..heads).flat_map(|h| (0..dy.len() / channels).map(move |i| (h, i))) {
            // Where a channel of a pixel's query is, of its key and of its value.
            let query = |c: usize| i * channels + head * width + c;
            let key = |j: usize, c: usize| 2 * j * channels + head * width + c;
            let value = |j: usize, c: usize| key(j, c) + channels;
            let shares = self.shares(heads, head, i, q, kv);
            let by_share = |j: usize| -> f64 {
                let products = (0..width).map(|c| dy[query(c)] * keys_values[value(j, c)]);
                products.sum()
            };
            let mean: f64 = (0..=i).map(|j| shares[j] * by_share(j)).sum();
            for (j, share) in shares.iter().enumerate() {
                let by_product = share * (by_share(j) - mean) * scale;
                for c in 0..width {
                    by_map[q][query(c)] += by_product * keys_values[key(j, c)];
                    by_map[kv][key(j, c)] += by_product * queries[query(c)];
                    by_map[kv][value(j, c)] += share * dy[query(c)];
                }
            }
        }
    }

    fn backward_layer(
        &self,
        layer: &Layer,
        [x, y]: [usize; 2],
        dy: &[f64],
        dx: &mut [f64],
        gradients: &mut [Vec<f64>],
    ) {
        let (inputs, outputs) = (layer.inputs, layer.outputs);
        let [v, g] = [0, 1].map(|k| &self.parameters[layer.parameter + k]);
        let weight = self.weight(layer);
        let mut d_weight = vec![0.0; v.len()];
        let maps = [self.map(x), self.map(y)];
        joined(layer, maps, self.columns, &mut |tap, [from, to]| {
            for i in 0..inputs {
                for o in 0..outputs {
                    let at = (tap * inputs + i) * outputs + o;
                    let dy = dy[to * outputs + o];
                    d_weight[at] += dy * self.map(x).values[from * inputs + i];
                    dx[from * inputs + i] += dy * weight.values[at];
                }
            }
        });
        for pixel in dy.chunks(outputs) {
            add(&mut gradients[layer.parameter + 2], pixel);
        }
        // Of ||V|| the derivative is V / ||V||, but for where the floor makes it constant.
        let mut along = vec![0.0; outputs];
        for (i, place) in weight.places.iter().enumerate() {
            along[i % outputs] += d_weight[i] * v[*place] / weight.norms[i % outputs];
        }
        add(&mut gradients[layer.parameter + 1], &along);
        for (i, place) in weight.places.iter().enumerate() {
            let o = i % outputs;
            let radial = match weight.floored[o] {
                true => 0.0,
                false => along[o] * v[*place] / weight.norms[o],
            };
            gradients[layer.parameter][*place] += g[o] / weight.norms[o] * (d_weight[i] - radial);
        }
    }
}

fn add(sum: &mut [f64], values: &[f64]) {
    assert_eq!(sum.len(), values.len());
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value;
    }
}

impl Pass for Tape<'_> {
    /// A map's number.
    type Map = usize;

    fn append_ones(&mut self, x: &usize) -> usize {
        let channels = self.map(*x).channels + 1;
        let with_ones = self.map(*x).map(channels, |pixel| [pixel, &[1.0]].concat());
        self.note(Origin::Ones(*x), with_ones)
    }

    fn embed(&mut self, layer: &Layer, x: &usize, map: usize) -> usize {
        let first = map * self.config.nr_codes;
        let one_hot = self.map(*x).map(layer.inputs, |pixel| {
            pixel[first..first + layer.inputs].to_vec()
        });
        let one_hot = self.note(Origin::Image, one_hot);
        let embedded = self.layer(layer, &one_hot);
        self.append_ones(&embedded)
    }

    fn first_channels(&mut self, x: &usize, channels: usize) -> usize {
        let first = self
            .map(*x)
            .map(channels, |pixel| pixel[..channels].to_vec());
        self.note(Origin::First(*x), first)
    }

    fn layer(&mut self, layer: &Layer, x: &usize) -> usize {
        let (map, weight) = (self.map(*x), self.weight(layer));
        let (inputs, outputs) = (layer.inputs, layer.outputs);
        let scale = layer.scale_of_output(map.scale);
        let size = self.config.size_at(scale);
        let bias = &self.parameters[layer.parameter + 2];
        let values = (0..size[0] * size[1]).flat_map(|_| bias).copied();
        let mut out = Map::new(self.config, scale, outputs, values.collect());
        let mut values = std::mem::take(&mut out.values);
        joined(layer, [map, &out], self.columns, &mut |tap, [from, to]| {
            for i in 0..inputs {
                for o in 0..outputs {
                    let weight = weight.values[(tap * inputs + i) * outputs + o];
                    values[to * outputs + o] += map.values[from * inputs + i] * weight;
                }
            }
        });
        out.values = values;
        self.note(Origin::Layer(layer.clone(), *x), out)
    }

    fn gated_resnet(&mut self, block: &GatedResnet, x: &usize, a: Option<&usize>) -> usize {
        let f = self.config.nonlinearity;
        let f_x = self.bent(f, *x);
        let mut c1 = self.layer(&block.conv_1, &f_x);
        if let (Some(nin), Some(a)) = (&block.nin, a) {
            let f_a = self.bent(f, *a);
            let projected = self.layer(nin, &f_a);
            c1 = self.add(c1, projected);
        }
        let f_c1 = self.bent(f, c1);
        let dropped = self.dropped(block, f_c1);
        let c2 = self.layer(&block.conv_2, &dropped);
        let gates = self.gates(c2, block.conditional);
        let channels = self.map(*x).channels;
        let pixels = self.map(*x).pixels().zip(gates.pixels());
        let values = pixels.flat_map(|(x, gates)| {
            (0..channels).map(move |i| x[i] + gates[i] * sigmoid(gates[channels + i]))
        });
        let out = gates.like(channels, values.collect());
        self.note(Origin::Gated(*x, c2, block.conditional), out)
    }

    fn down_shift(&mut self, x: usize) -> usize {
        self.shifted([1, 0], x)
    }

    fn right_shift(&mut self, x: usize) -> usize {
        self.shifted([0, 1], x)
    }

    fn add(&mut self, x: usize, y: usize) -> usize {
        let mut sum = self.map(x).clone();
        add(&mut sum.values, &self.map(y).values);
        self.note(Origin::Sum(x, y), sum)
    }

    fn concat(&mut self, x: &usize, y: &usize) -> usize {
        let (a, b) = (self.map(*x), self.map(*y));
        let values = a
            .pixels()
            .zip(b.pixels())
            .flat_map(|(a, b)| [a, b].concat());
        let both = a.like(a.channels + b.channels, values.collect());
        self.note(Origin::Concatenated(*x, *y), both)
    }

    fn elu(&mut self, x: usize) -> usize {
        self.bent(Nonlinearity::Elu, x)
    }

    fn attention(&mut self, heads: usize, q: &usize, kv: &usize) -> usize {
        let Map { size, channels, .. } = *self.map(*q);
        let width = channels / heads;
        let mut values = vec![0.0; self.map(*q).values.len()];
        for i in 0..size[0] * size[1] {
            for head in 0..heads {
                for (j, share) in self.shares(heads, head, i, *q, *kv).iter().enumerate() {
                    for c in head * width..(head + 1) * width {
                        let value = self.map(*kv).values[(2 * j + 1) * channels + c];
                        values[i * channels + c] += share * value;
                    }
                }
            }
        }
        let seen = self.map(*q).like(channels, values);
        self.note(Origin::Attended(heads, *q, *kv), seen)
    }

    fn record(&mut self, map: &usize) {
        self.recorded.push(*map);
    }
}
