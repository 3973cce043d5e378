//! The layers of PyTorch models under the original's names and in its layouts: of the port
//! (pclucas14/pixel-cnn-pp) and of this project's benchmark model (`benches/peers/model.py`).

use super::{Fault, Tensor, Tensors};

/// The most blocks of a stack that are looked for.
const MAX_BLOCKS: usize = 64;

/// What a layer is in PyTorch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Conv,
    Deconv,
    Dense,
}

/// Renames and transposes the parameters of a state dict.
///
/// # Errors
/// Where the state dict is of another model.
pub fn to_original(mut tensors: Tensors) -> Result<Tensors, Fault> {
    // Of a model that was trained on several GPUs.
    const PARALLEL: &str = "module.";
    if tensors.keys().all(|name| name.starts_with(PARALLEL)) {
        let unwrap = |(name, tensor): (String, Tensor)| (name[PARALLEL.len()..].into(), tensor);
        tensors = tensors.into_iter().map(unwrap).collect();
    }
    let has = |tensors: &Tensors, name: &str| tensors.contains_key(name);
    if has(&tensors, "u_init.conv.weight_v") {
        let blocks = (0..MAX_BLOCKS).take_while(|block| {
            let name = format!("up_layers.0.u_stream.{block}.conv_input.conv.weight_v");
            has(&tensors, &name)
        });
        let layers = port_layers(blocks.count());
        rename(tensors, layers, ["weight_v", "weight_g", "bias"])
    } else if has(&tensors, "first.V") {
        // Three scales of blocks, and two layers between them.
        let stages = (0..3 * MAX_BLOCKS + 2).take_while(|stage| {
            let names = [format!("up.{stage}.0.V"), format!("up.{stage}.0.conv_1.V")];
            names.iter().any(|name| has(&tensors, name))
        });
        let layers = benchmark_layers(stages.count().saturating_sub(2) / 3);
        rename(tensors, layers, ["V", "g", "b"])
    } else {
        Err(Fault::Refused(
            "its layers have the names of no PyTorch PixelCNN++ that is known here".into(),
        ))
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

/// Gives the layers, whose parameters are called `[V, g, b]`, the original's names and layouts.
fn rename(
    mut tensors: Tensors,
    layers: Vec<(String, Kind)>,
    [v, g, b]: [&str; 3],
) -> Result<Tensors, Fault> {
    let mut renamed = Tensors::new();
    let mut counts = [0; 3];
    for (layer, kind) in layers {
        let name = ["conv2d", "deconv2d", "dense"][kind as usize];
        let count = &mut counts[kind as usize];
        let name = format!("model/{name}_{count}");
        *count += 1;
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
        if kind == Kind::Deconv && g.shape.len() == 4 {
            (v, g) = per_output(v, &g);
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
        Some(tensor) => Err(Fault::Tensor {
            tensor,
            reason: "is not part of the model".into(),
        }),
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

/// Direction and length of the weight \[in, out, rows, columns\] whose lengths `g` are those of its
/// input channels, with the lengths of its output channels instead.
fn per_output(mut v: Tensor, g: &Tensor) -> (Tensor, Tensor) {
    let (&[inputs, outputs, rows, columns], true) = (&v.shape[..], g.shape[0] == v.shape[0]) else {
        return (v, g.clone());
    };
    let size = outputs * rows * columns;
    let norm = |squares: f64| squares.sqrt();
    let square = |&value: &f32| f64::from(value) * f64::from(value);
    for (i, &g) in (0..inputs).zip(&g.values) {
        let channel = &mut v.values[i * size..(i + 1) * size];
        let scale = f64::from(g) / norm(channel.iter().map(square).sum());
        for value in channel {
            *value = (f64::from(*value) * scale) as f32;
        }
    }
    let mut squares = vec![0.0; outputs];
    for (n, value) in v.values.iter().enumerate() {
        squares[n / (rows * columns) % outputs] += square(value);
    }
    let values = squares.into_iter().map(|squares| norm(squares) as f32);
    let g = Tensor {
        shape: vec![outputs],
        values: values.collect(),
    };
    (v, g)
}
