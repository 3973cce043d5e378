//! A model's parameters in the order in which the sums read them, weight normalisation folded in.

use super::program::{Phase, Program, Sum, Tap, When};
use super::tile::PANEL;
use crate::config::ModelConfig;
use crate::kernels::weight_norm::WeightNorm;
use crate::network::{Layer, LayerKind};

/// Floats that fill a cache line, and lie in one.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub [f32; PANEL]);

impl Line {
    pub const ZERO: Line = Line([0.0; PANEL]);

    /// All the floats of some lines.
    pub fn floats(lines: &[Line]) -> &[f32] {
        // SAFETY: lines are arrays of floats with nothing between them.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * PANEL) }
    }

    /// The same, to be written.
    pub fn floats_mut(lines: &mut [Line]) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * PANEL) }
    }
}

/// All weights and biases.
#[derive(Debug)]
pub struct PackedWeights {
    lines: Vec<Line>,
    /// For every sum.
    sums: Vec<SumWeights>,
    /// What is made of each code, \[codes, filters\]: of the pixel's own, and of those of the coarser map.
    embeddings: [Vec<f32>; 2],
}

#[derive(Debug)]
struct SumWeights {
    /// Where the bias begins, or those of all classes.
    bias: usize,
    /// For every phase where the weights of its row taps and of its pixel taps begin:
    /// \[panels of both halves, taps, inputs, [`PANEL`]\].
    phases: Vec<[usize; 2]>,
    /// Where the weights of the taps into pairs begin: \[4, panels of both halves, taps, inputs,
    /// [`PANEL`]\].
    pairs: usize,
}

impl PackedWeights {
    /// Packs `parameters`, which must be shaped as the layout says.
    pub fn pack(program: &Program, parameters: &[Vec<f32>]) -> PackedWeights {
        let layers: Vec<Folded> = program
            .layers
            .iter()
            .map(|layer| Folded::new(layer, &parameters[layer.parameter..][..3]))
            .collect();
        let mut lines = Vec::new();
        let sums = program.sums.iter().map(|sum| SumWeights {
            pairs: pack_pairs(sum, &layers, &mut lines),
            bias: pack_bias(sum, &layers, parameters, &mut lines),
            phases: sum
                .phases
                .iter()
                .map(|Phase { row, pixel }| {
                    [row, pixel].map(|taps| pack_taps(sum, taps, &layers, &mut lines))
                })
                .collect(),
        });
        let sums = sums.collect();
        let table = |layer: usize| {
            let Folded { layer: of, b, .. } = layers[layer];
            let codes = (0..of.inputs).flat_map(|code| (0..of.outputs).map(move |out| (code, out)));
            let value = |(code, out)| layers[layer].weight(0, code, out) as f32 + b[out];
            codes.map(value).collect()
        };
        PackedWeights {
            lines,
            sums,
            embeddings: program
                .embeddings
                .map(|layer| layer.map(table).unwrap_or_default()),
        }
    }

    /// What is made of each code, \[codes, filters\]: of the pixel's own (0), or of those of the coarser map
    /// (1).
    pub fn embedding(&self, map: usize) -> &[f32] {
        &self.embeddings[map]
    }

    /// All of them; where what begins, the next functions say.
    pub fn values(&self) -> &[f32] {
        Line::floats(&self.lines)
    }

    /// Where the bias of a sum \[columns\] begins, for a class if it is conditional.
    pub fn bias_at(&self, number: usize, sum: &Sum, class: usize) -> usize {
        self.sums[number].bias * PANEL + class * sum.columns()
    }

    /// Where the weights of a phase's row taps or pixel taps begin:
    /// \[panels of both halves, taps, inputs, [`PANEL`]\].
    pub fn taps_at(&self, number: usize, phase: usize, when: When) -> usize {
        self.sums[number].phases[phase][when as usize] * PANEL
    }

    /// The bias of a sum \[columns\], for a class if it is conditional.
    pub(super) fn bias(&self, number: usize, sum: &Sum, class: usize) -> &[f32] {
        &self.values()[self.bias_at(number, sum, class)..][..sum.columns()]
    }

    /// From the weights of a phase's row taps or pixel taps on.
    pub(super) fn taps(&self, number: usize, phase: usize, when: When) -> &[f32] {
        &self.values()[self.taps_at(number, phase, when)..]
    }

    /// From the weights of the taps into pairs on.
    pub(super) fn pairs(&self, number: usize) -> &[f32] {
        Line::floats(&self.lines[self.sums[number].pairs..])
    }

    /// For each pixel of an image as a model takes it what is made of the coarser map's code there; or that
    /// code, where the model has no such one.
    pub fn embedded_coarse<'a>(
        &'a self,
        config: &ModelConfig,
        image: &'a [u8],
    ) -> impl Iterator<Item = Result<&'a [f32], usize>> {
        let (table, filters) = (self.embedding(1), config.nr_filters);
        let pixels = image.chunks_exact(config.bytes_per_pixel());
        pixels.map(move |pixel| {
            let code = ModelConfig::code(pixel, 1);
            let row = table.get(code * filters..(code + 1) * filters);
            row.ok_or(code)
        })
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        let tables: usize = self.embeddings.iter().map(Vec::len).sum();
        self.lines.len() * size_of::<Line>() + tables * size_of::<f32>()
    }
}

/// A layer's parameters; its weight is `v` times the scale of the output.
struct Folded<'a> {
    layer: &'a Layer,
    v: &'a [f32],
    b: &'a [f32],
    scales: Vec<f64>,
}

impl<'a> Folded<'a> {
    /// In double precision and in one order, so that the weights are the same everywhere.
    fn new(layer: &'a Layer, parameters: &'a [Vec<f32>]) -> Folded<'a> {
        let [v, g, b] = [0, 1, 2].map(|k| &parameters[k][..]);
        let WeightNorm {
            outputs,
            inner,
            floor,
            ..
        } = WeightNorm::of(layer);
        let mut scales = vec![0.0; outputs];
        for row in v.chunks_exact(outputs * inner) {
            for (square, v) in scales.iter_mut().zip(row.chunks_exact(inner)) {
                for &v in v {
                    *square += f64::from(v) * f64::from(v);
                }
            }
        }
        for (scale, &g) in scales.iter_mut().zip(g) {
            *scale = f64::from(g) / scale.max(floor).sqrt();
        }
        Folded {
            layer,
            v,
            b,
            scales,
        }
    }

    fn weight(&self, tap: usize, input: usize, output: usize) -> f64 {
        let Layer {
            inputs, outputs, ..
        } = *self.layer;
        let at = match self.layer.kind {
            LayerKind::Conv | LayerKind::Dense => (tap * inputs + input) * outputs + output,
            LayerKind::Deconv => (tap * outputs + output) * inputs + input,
        };
        f64::from(self.v[at]) * self.scales[output]
    }

    /// Winograd's transform of the three weights in a row of the kernel.
    fn paired(&self, row: usize, input: usize, output: usize) -> [f64; 4] {
        let [w0, w1, w2] = [0, 1, 2].map(|column| self.weight(3 * row + column, input, output));
        [w0, (w0 + w1 + w2) / 2.0, (w0 - w1 + w2) / 2.0, w2]
    }
}

/// The output channels of a sum's panels; beyond the last one is nothing.
fn panels(sum: &Sum) -> impl Iterator<Item = [Option<usize>; PANEL]> + use<> {
    let (channels, panels, halves) = (sum.channels, sum.panels(), sum.halves());
    (0..halves).flat_map(move |half| {
        (0..panels).map(move |panel| {
            std::array::from_fn(|lane| {
                let channel = panel * PANEL + lane;
                (channel < channels).then_some(half * channels + channel)
            })
        })
    })
}

fn pack_taps(sum: &Sum, taps: &[Tap], layers: &[Folded], lines: &mut Vec<Line>) -> usize {
    let start = lines.len();
    for outputs in panels(sum) {
        for tap in taps {
            let layer = &layers[tap.layer];
            let ones = layer.layer.inputs - 1;
            for input in tap.inputs.iter().cloned().flatten() {
                let bias = |output: usize| match tap.bias_on_ones && input == ones {
                    true => layer.b[output],
                    false => 0.0,
                };
                lines.push(Line(outputs.map(|output| {
                    output.map_or(0.0, |output| {
                        layer.weight(tap.tap, input, output) as f32 + bias(output)
                    })
                })));
            }
        }
    }
    start
}

fn pack_pairs(sum: &Sum, layers: &[Folded], lines: &mut Vec<Line>) -> usize {
    let start = lines.len();
    for product in 0..4 {
        for outputs in panels(sum) {
            for tap in &sum.pairs {
                let layer = &layers[tap.layer];
                for input in tap.inputs.iter().cloned().flatten() {
                    lines.push(Line(outputs.map(|output| {
                        output.map_or(0.0, |output| {
                            layer.paired(tap.tap / 3, input, output)[product] as f32
                        })
                    })));
                }
            }
        }
    }
    start
}

/// One bias, or one for each class.
fn pack_bias(
    sum: &Sum,
    layers: &[Folded],
    parameters: &[Vec<f32>],
    lines: &mut Vec<Line>,
) -> usize {
    let start = lines.len();
    let size = sum.halves() * sum.channels;
    let bias: Vec<f32> = (0..size)
        .map(|output| {
            sum.biases
                .iter()
                .map(|&layer| layers[layer].b[output])
                .sum()
        })
        .collect();
    let none = vec![0.0; size];
    let classes = match sum.conditional {
        Some(parameter) => &parameters[parameter],
        None => &none,
    };
    for class in classes.chunks_exact(size) {
        lines.extend(panels(sum).map(|outputs| {
            Line(outputs.map(|output| output.map_or(0.0, |output| bias[output] + class[output])))
        }));
    }
    start
}
