//! The layers of PyTorch models under the original's names and in its layouts: of the port
//! (pclucas14/pixel-cnn-pp) and of this project's benchmark model (`benches/peers/model.py`), and
//! which of a file's tensors are those layers'.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::swap;

use pixelcnn_core::ModelConfig;
use pixelcnn_core::network::Layout;

use super::original::AVERAGE;
use super::{Fault, Tensor, Tensors, WeightsError};

/// The most blocks of a stack that are looked for.
const MAX_BLOCKS: usize = 64;

/// The most models of a file that are told from each other.
const MAX_MODELS: usize = 4;

/// What a layer is in PyTorch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Conv,
    Deconv,
    Dense,
}

/// The direction of the first layer's weights, of the port and of the benchmark model: by it a model
/// is known.
const FIRST: [&str; 2] = ["u_init.conv.weight_v", "first.V"];

/// What puts a model into another one that computes the same, and its name before a dot:
/// (Distributed)DataParallel and AveragedModel, `torch.compile`, FSDP, activation checkpointing.
const WRAPPERS: [&str; 4] = [
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
];

/// What PyTorch's weight normalisation calls its parameters since 2.0, and called them before.
const NORMALISED: [(&str, &str); 2] = [
    (".parametrizations.weight.original0", ".weight_g"),
    (".parametrizations.weight.original1", ".weight_v"),
];

/// Of how many an `AveragedModel` is the average.
const AVERAGED: &str = "n_averaged";

/// Parts of names that are given to averages.
const AVERAGES: [&str; 6] = ["ema", "average", "avg", "polyak", "shadow", "swa"];

/// A tensor's name as a bare model of an older PyTorch has it.
fn bare(name: &str) -> String {
    let parts = name.split('.').filter(|part| !WRAPPERS.contains(part));
    let mut bare = parts.collect::<Vec<_>>().join(".");
    for (new, old) in NORMALISED {
        if let Some(layer) = bare.strip_suffix(new) {
            bare = format!("{layer}{old}");
        }
    }
    bare
}

/// What comes before the layer's name, where it is a model's first layer.
fn prefix(bare: &str) -> Option<&str> {
    let mut prefixes = FIRST.iter().filter_map(|first| bare.strip_suffix(first));
    prefixes.find(|prefix| prefix.is_empty() || prefix.ends_with('.'))
}

/// Whether it is the name of a model's first layer.
pub(super) fn is_first(name: &str) -> bool {
    prefix(&bare(name)).is_some()
}

/// Tensors by name, each with what it is called in the file.
pub(super) type Named<T> = BTreeMap<String, (String, T)>;

/// # Errors
/// Where two have the same name.
pub(super) fn by_name<T>(
    tensors: impl IntoIterator<Item = (String, (String, T))>,
) -> Result<Named<T>, Fault> {
    let mut named = Named::new();
    for (name, tensor) in tensors {
        if let Some((tensor, _)) = named.insert(name, tensor) {
            let reason = "is there twice".into();
            return Err(Fault::Tensor { tensor, reason });
        }
    }
    Ok(named)
}

/// A model in a file.
struct Model<T> {
    /// What comes before its layers' names there.
    path: String,
    is_average: bool,
    tensors: Named<T>,
}

/// Finds the weights and averages of one model in the dicts of a file, each with the way to it and
/// its tensors. A model's tensors are those whose names begin as its first layer's does; all of a
/// dict have to be some model's. Of two models those are the averages that have one of [`AVERAGES`]
/// before their layers' names, or that are an `AveragedModel`; equal ones count once. Averages alone
/// are the weights.
///
/// # Errors
/// Where a tensor is not part of a model, or there are several models.
pub(super) fn choose<T: PartialEq>(
    dicts: Vec<(String, Vec<(String, T)>)>,
) -> Result<Named<T>, Fault> {
    let mut models: Vec<Model<T>> = Vec::new();
    for (path, tensors) in dicts {
        let tensors = tensors.into_iter();
        let mut tensors = by_name(tensors.map(|(name, tensor)| (bare(&name), (name, tensor))))?;
        let prefixes = tensors.keys().filter_map(|name| prefix(name));
        let prefixes: BTreeSet<String> = prefixes.map(str::to_owned).collect();
        if prefixes.len() > MAX_MODELS {
            return Err(several(prefixes.iter().map(|prefix| &prefix[..])));
        }
        // Backwards, so that longer ones come before what they begin with.
        for prefix in prefixes.into_iter().rev() {
            let of_model = tensors.extract_if(.., |name, _| name.starts_with(&prefix));
            let of_model = of_model.map(|(name, tensor)| (name[prefix.len()..].to_owned(), tensor));
            let model = Model::new(format!("{path}{prefix}"), of_model.collect())?;
            let same = models.iter_mut().find(|other| other.equals(&model));
            match same {
                Some(other) => other.is_average &= model.is_average,
                None => models.push(model),
            }
        }
        if let Some((tensor, _)) = tensors.into_values().next() {
            return Err(not_part(tensor));
        }
    }
    let (mut averages, mut weights): (Vec<_>, Vec<_>) =
        models.into_iter().partition(|model| model.is_average);
    if weights.is_empty() {
        swap(&mut weights, &mut averages);
    }
    if weights.len() > 1 || averages.len() > 1 {
        let all = weights.iter().chain(&averages);
        return Err(several(all.map(|model| &model.path[..])));
    }
    let weights = weights.into_iter().flat_map(|model| model.tensors);
    let averages = averages.into_iter().flat_map(|model| model.tensors);
    let averages = averages.map(|(name, tensor)| (format!("{name}{AVERAGE}"), tensor));
    Ok(weights.chain(averages).collect())
}

impl<T: PartialEq> Model<T> {
    fn new(path: String, mut tensors: Named<T>) -> Result<Model<T>, Fault> {
        let lower = path.to_lowercase();
        let is_average = AVERAGES.iter().any(|part| lower.contains(part));
        let is_average = tensors.remove(AVERAGED).is_some() || is_average;
        let (layers, parameters) = layers(&tensors)?;
        let names = layers
            .iter()
            .flat_map(|(layer, _)| parameters.map(|parameter| format!("{layer}.{parameter}")));
        let names: BTreeSet<String> = names.collect();
        let mut unknown = tensors.iter().filter(|(name, _)| !names.contains(*name));
        match unknown.next() {
            Some((_, (tensor, _))) => Err(not_part(tensor.clone())),
            None => Ok(Model {
                path,
                is_average,
                tensors,
            }),
        }
    }

    /// Whether another one has the same tensors.
    fn equals(&self, other: &Model<T>) -> bool {
        let mut pairs = self.tensors.iter().zip(&other.tensors);
        self.tensors.len() == other.tensors.len()
            && pairs.all(|((a, (_, x)), (b, (_, y)))| (a, x) == (b, y))
    }
}

fn not_part(tensor: String) -> Fault {
    let reason = "is not part of the model".into();
    Fault::Tensor { tensor, reason }
}

fn several<'a>(paths: impl Iterator<Item = &'a str>) -> Fault {
    let paths = paths
        .take(MAX_MODELS)
        .map(|path| match path.trim_end_matches('.') {
            "" => "one at its top".into(),
            path => format!("{path:?}"),
        });
    Fault::Refused(format!(
        "it holds several models ({}): save the state_dict() of one alone",
        paths.collect::<Vec<_>>().join(", ")
    ))
}

/// Gives the weights of a state dict, and their averages, the original's names and layouts.
///
/// # Errors
/// Where they are of another model.
pub fn to_original(mut tensors: Tensors) -> Result<Tensors, Fault> {
    let averages = tensors.extract_if(.., |name, _| name.ends_with(AVERAGE));
    let averages =
        averages.map(|(name, tensor)| (name[..name.len() - AVERAGE.len()].into(), tensor));
    let averages: Tensors = averages.collect();
    let mut renamed = rename(tensors)?;
    if !averages.is_empty() {
        let averages = rename(averages)?.into_iter();
        renamed.extend(averages.map(|(name, tensor)| (format!("{name}{AVERAGE}"), tensor)));
    }
    Ok(renamed)
}

/// Layers in the original's creation order, and what direction, length and bias of each are called.
type Layers = (Vec<(String, Kind)>, [&'static str; 3]);

/// The layers that a model with tensors of these names has.
fn layers<T>(tensors: &BTreeMap<String, T>) -> Result<Layers, Fault> {
    let has = |name: &str| tensors.contains_key(name);
    let [port, benchmark] = FIRST.map(has);
    if port {
        let last = (0..MAX_BLOCKS).rev().find(|block| {
            has(&format!(
                "up_layers.0.u_stream.{block}.conv_input.conv.weight_v"
            ))
        });
        let blocks = last.map_or(0, |last| last + 1);
        Ok((port_layers(blocks), ["weight_v", "weight_g", "bias"]))
    } else if benchmark {
        // Three scales of blocks, and two layers between them.
        let last = (0..3 * MAX_BLOCKS + 2).rev().find(|stage| {
            let names = [format!("up.{stage}.0.V"), format!("up.{stage}.0.conv_1.V")];
            names.iter().any(|name| has(name))
        });
        let blocks = last.map_or(0, |last| last.saturating_sub(1) / 3);
        Ok((benchmark_layers(blocks), ["V", "g", "b"]))
    } else {
        let name = tensors.keys().next().map_or("", |name| name);
        Err(Fault::Refused(format!(
            "it is of no PyTorch PixelCNN++ that is known here: it has a layer {name:?}, but no {:?}",
            FIRST[0]
        )))
    }
}

/// The port's layers in the original's creation order.
fn port_layers(blocks: usize) -> Vec<(String, Kind)> {
    let mut layers = vec![
        ("u_init.conv".into(), Kind::Conv),
        ("ul_init.0.conv".into(), Kind::Conv),
        ("ul_init.1.conv".into(), Kind::Conv),
    ];
    for (pass, between, name, kind) in [
        ("up", "downsize", "conv", Kind::Conv),
        ("down", "upsize", "deconv", Kind::Deconv),
    ] {
        for scale in 0..3 {
            if scale > 0 {
                for stack in ["u", "ul"] {
                    let layer = format!("{between}_{stack}_stream.{}.{name}", scale - 1);
                    layers.push((layer, kind));
                }
            }
            for block in 0..blocks + usize::from(pass == "down" && scale > 0) {
                for stack in ["u", "ul"] {
                    let block = format!("{pass}_layers.{scale}.{stack}_stream.{block}");
                    layers.push((format!("{block}.conv_input.conv"), Kind::Conv));
                    if (pass, stack) != ("up", "u") {
                        layers.push((format!("{block}.nin_skip.lin_a"), Kind::Dense));
                    }
                    layers.push((format!("{block}.conv_out.conv"), Kind::Conv));
                }
            }
        }
    }
    layers.push(("nin_out.lin_a".into(), Kind::Dense));
    layers
}

/// The benchmark model's layers in the original's creation order.
fn benchmark_layers(blocks: usize) -> Vec<(String, Kind)> {
    let mut layers = ["first", "above", "left"]
        .map(|name| (name.to_owned(), Kind::Conv))
        .to_vec();
    for (pass, kind) in [("up", Kind::Conv), ("down", Kind::Deconv)] {
        let mut stage = 0;
        for scale in 0..3 {
            if scale > 0 {
                layers.extend([0, 1].map(|stack| (format!("{pass}.{stage}.{stack}"), kind)));
                stage += 1;
            }
            for _ in 0..blocks + usize::from(pass == "down" && scale > 0) {
                for stack in [0, 1] {
                    let block = format!("{pass}.{stage}.{stack}");
                    layers.push((format!("{block}.conv_1"), Kind::Conv));
                    if (pass, stack) != ("up", 0) {
                        layers.push((format!("{block}.nin"), Kind::Dense));
                    }
                    layers.push((format!("{block}.conv_2"), Kind::Conv));
                }
                stage += 1;
            }
        }
    }
    layers.push(("out".into(), Kind::Dense));
    layers
}

/// A model's parameters, given in the order of [`Layout`], under the port's names and in its layouts, in the
/// order of its layers.
///
/// # Errors
/// [`WeightsError::BeyondThePort`].
pub fn from_original(
    config: &ModelConfig,
    parameters: &[Vec<f32>],
) -> Result<Vec<(String, Tensor)>, WeightsError> {
    let classes = ("nr_classes", config.nr_classes.to_string());
    let classes = (config.nr_classes > 0).then_some(classes);
    let later = config
        .later_settings()
        .map(|(name, value, _)| (name, value));
    if let Some((setting, value)) = later.chain(classes).next() {
        return Err(WeightsError::BeyondThePort { setting, value });
    }
    let layout = Layout::new(config);
    let parameters = layout.parameters.iter().zip(parameters);
    let mut named: BTreeMap<&str, Tensor> = parameters
        .map(|(parameter, values)| {
            let (shape, values) = (parameter.shape.clone(), values.clone());
            (&parameter.name[..], Tensor { shape, values })
        })
        .collect();
    let mut found = Vec::new();
    let mut counts = [0; 3];
    for (layer, kind) in port_layers(config.nr_resnet) {
        let original = original_name(kind, &mut counts);
        let mut take = |parameter| {
            let tensor = named.remove(&format!("{original}/{parameter}")[..]);
            tensor.expect("the port has the original's layers")
        };
        let (v, mut g, b) = (take("V"), take("g"), take("b"));
        let mut v = match v.shape[..] {
            [rows, columns, inputs, outputs] => Tensor {
                shape: vec![outputs, inputs, rows, columns],
                values: transpose(&v.values, [rows * columns, inputs, outputs]),
            },
            _ => Tensor {
                values: transpose(&v.values, [v.shape[0], 1, v.shape[1]]),
                shape: vec![v.shape[1], v.shape[0]],
            },
        };
        // See below.
        if kind == Kind::Deconv {
            (v, g) = with_other_lengths(v, &g, 1);
        }
        g.shape = vec![1; v.shape.len()];
        g.shape[0] = g.values.len();
        found.extend([
            (format!("{layer}.weight_g"), g),
            (format!("{layer}.weight_v"), v),
            (format!("{layer}.bias"), b),
        ]);
    }
    Ok(found)
}

/// The original's name of the next layer of a kind.
fn original_name(kind: Kind, counts: &mut [usize; 3]) -> String {
    let name = ["conv2d", "deconv2d", "dense"][kind as usize];
    let count = &mut counts[kind as usize];
    *count += 1;
    format!("model/{name}_{}", *count - 1)
}

fn rename(mut tensors: Tensors) -> Result<Tensors, Fault> {
    let (layers, [v, g, b]) = layers(&tensors)?;
    let mut renamed = Tensors::new();
    let mut counts = [0; 3];
    for (layer, kind) in layers {
        let name = original_name(kind, &mut counts);
        let mut take = |parameter| {
            let tensor = format!("{layer}.{parameter}");
            let found = tensors.remove(&tensor);
            found.ok_or(Fault::Tensor {
                tensor,
                reason: "is missing".into(),
            })
        };
        let (mut v, mut g, b) = (take(v)?, take(g)?, take(b)?);
        // The port's transposed convolutions have a length for each *input* channel.
        if kind == Kind::Deconv
            && g.shape.len() == 4
            && v.shape.len() == 4
            && g.shape[0] == v.shape[0]
        {
            (v, g) = with_other_lengths(v, &g, 0);
        }
        let v = match (kind, &v.shape[..]) {
            (Kind::Dense, &[outputs, inputs] | &[outputs, inputs, 1, 1]) => Tensor {
                shape: vec![inputs, outputs],
                values: transpose(&v.values, [outputs, inputs, 1]),
            },
            (Kind::Conv | Kind::Deconv, &[a, b, rows, columns]) => Tensor {
                shape: vec![rows, columns, b, a],
                values: transpose(&v.values, [a, b, rows * columns]),
            },
            _ => {
                return Err(Fault::Tensor {
                    tensor: layer,
                    reason: format!("has a weight of shape {:?}", v.shape),
                });
            }
        };
        g.shape = vec![g.values.len()];
        renamed.insert(format!("{name}/V"), v);
        renamed.insert(format!("{name}/g"), g);
        renamed.insert(format!("{name}/b"), b);
    }
    match tensors.into_keys().next() {
        None => Ok(renamed),
        Some(tensor) => Err(not_part(tensor)),
    }
}

/// \[a, b, c\] to \[c, b, a\].
fn transpose(values: &[f32], [a, b, c]: [usize; 3]) -> Vec<f32> {
    let mut transposed = Vec::with_capacity(values.len());
    for k in 0..c {
        for j in 0..b {
            transposed.extend((0..a).map(|i| values[(i * b + j) * c + k]));
        }
    }
    transposed
}

/// Direction and length of the weight \[a, b, rows, columns\] whose lengths `g` are those of its channels
/// along one of the first two axes, with the lengths of those along the other one instead.
fn with_other_lengths(mut v: Tensor, g: &Tensor, axis: usize) -> (Tensor, Tensor) {
    let size: usize = v.shape[2..].iter().product();
    let sides = [v.shape[0], v.shape[1]];
    let channel = |n: usize, axis: usize| [n / size / sides[1], n / size % sides[1]][axis];
    let lengths = |v: &Tensor, axis: usize| -> Vec<f64> {
        let mut squares = vec![0.0; sides[axis]];
        for (n, &value) in v.values.iter().enumerate() {
            squares[channel(n, axis)] += f64::from(value) * f64::from(value);
        }
        squares.into_iter().map(f64::sqrt).collect()
    };
    let own = lengths(&v, axis);
    for (n, value) in v.values.iter_mut().enumerate() {
        let channel = channel(n, axis);
        let scale = f64::from(g.values[channel]) / own[channel];
        *value = (f64::from(*value) * scale) as f32;
    }
    let other = lengths(&v, 1 - axis);
    let g = Tensor {
        shape: vec![other.len()],
        values: other.into_iter().map(|length| length as f32).collect(),
    };
    (v, g)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A state dict of no blocks, whose tensors are numbers.
    fn dict(path: &str, prefix: &str, from: usize) -> (String, Vec<(String, usize)>) {
        let names = port_layers(0).into_iter().flat_map(|(layer, _)| {
            ["weight_v", "weight_g", "bias"].map(|parameter| format!("{prefix}{layer}.{parameter}"))
        });
        let numbered = names.enumerate().map(|(n, name)| (name, from + n));
        (path.into(), numbered.collect())
    }

    #[test]
    fn the_ports_names_lead_back() {
        let config = ModelConfig {
            nr_resnet: 2,
            nr_filters: 6,
            ..ModelConfig::default()
        };
        let random = std::iter::successors(Some(7u32), |random| {
            Some(random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223))
        });
        let mut random = random.map(|random| (random >> 8) as f32 / (1 << 23) as f32 - 1.0);
        let layout = Layout::new(&config);
        let parameters: Vec<Vec<f32>> = layout
            .parameters
            .iter()
            .map(|parameter| random.by_ref().take(parameter.len()).collect())
            .collect();
        let port = from_original(&config, &parameters).unwrap();
        assert_eq!(port[0].0, "u_init.conv.weight_g");
        assert_eq!(port[0].1.shape, [6, 1, 1, 1]);
        assert_eq!(port[1].1.shape, [6, 4, 2, 3]);
        let back = to_original(port.into_iter().collect()).unwrap();
        assert_eq!(back.len(), layout.parameters.len());
        for (parameter, values) in layout.parameters.iter().zip(&parameters) {
            let found = &back[&parameter.name];
            assert_eq!(found.shape, parameter.shape, "{}", parameter.name);
            // Of transposed convolutions direction and length are told anew.
            if !parameter.name.contains("deconv") {
                assert_eq!(&found.values, values, "{}", parameter.name);
            }
        }
        let weight = |v: &[f32], g: &[f32], shape: &[usize]| -> Vec<f32> {
            let (outputs, inputs) = (shape[2], shape[3]);
            let output = |n: usize| n / inputs % outputs;
            let mut squares = vec![0.0; outputs];
            for (n, v) in v.iter().enumerate() {
                squares[output(n)] += v * v;
            }
            let scaled = v.iter().enumerate();
            let scaled = scaled.map(|(n, v)| v * g[output(n)] / squares[output(n)].sqrt());
            scaled.collect()
        };
        let values = |name: &str| {
            let number = layout.parameters.iter().position(|p| p.name == name);
            &parameters[number.unwrap()]
        };
        for number in 0..4 {
            let [v, g] = ["V", "g"].map(|what| format!("model/deconv2d_{number}/{what}"));
            let shape = &back[&v].shape;
            let wanted = weight(values(&v), values(&g), shape);
            let found = weight(&back[&v].values, &back[&g].values, shape);
            for (found, wanted) in found.iter().zip(&wanted) {
                assert!(
                    (found.abs() - wanted.abs()).abs() < 1e-5,
                    "{found} {wanted}"
                );
            }
        }
        let classes = ModelConfig {
            nr_classes: 10,
            ..config
        };
        let error = from_original(&classes, &parameters)
            .unwrap_err()
            .to_string();
        assert!(error.contains("nr_classes = 10"), "{error}");
    }

    #[test]
    fn equal_models_count_once() {
        let one = choose(vec![dict("", "", 0)]).unwrap();
        assert_eq!(one["u_init.conv.weight_v"].1, 0);
        let twice = vec![dict("ema.", "", 0), dict("model.", "net.", 0)];
        assert!(choose(twice).unwrap().keys().eq(one.keys()));
        // An average that is still the model, beside another model.
        let three = vec![
            dict("ema.", "", 0),
            dict("model.", "", 0),
            dict("best.", "", 7),
        ];
        let error = choose(three).unwrap_err().to_string();
        assert!(error.contains("(\"ema\", \"best\")"), "{error}");
        let averaged = choose(vec![dict("a.", "", 7), dict("a.EMA.", "", 0)]).unwrap();
        assert_eq!(averaged.len(), 2 * one.len());
        assert_eq!(averaged["u_init.conv.weight_v"].1, 7);
        assert_eq!(
            averaged["u_init.conv.weight_v/ExponentialMovingAverage"].1,
            0
        );
    }
}
