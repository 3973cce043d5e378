//! `pixelcnn import` and `export`, run as a program.

mod program;
#[path = "../../pixelcnn/tests/torch/mod.rs"]
mod torch;

use std::fs;
use std::path::{Path, PathBuf};

use npyz::WriterBuilder;
use safetensors::SafeTensors;
use tempfile::TempDir;

use pixelcnn::weights::pytorch;
use program::{contains, fails, pixelcnn, succeeds};
use torch::{Py, dict, others, save, single, text};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../pixelcnn/tests/golden")
        .join(name)
}

/// A folder with `images.npz`: the twelve golden images to train on, the first four to test on.
fn folder() -> TempDir {
    let file = fs::read(golden("golden_f32.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let images = tensors.tensor("images_u8").unwrap().data().to_vec();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("images.npz");
    let mut npz = npyz::npz::NpzWriter::create(path).unwrap();
    for (name, count) in [("trainx", 12), ("testx", 4)] {
        let array = npz.array(name, Default::default()).unwrap();
        let shape = [count, 8, 8, 3];
        let mut array = array.default_dtype().shape(&shape).begin_nd().unwrap();
        array
            .extend(&images[..shape.iter().product::<u64>() as usize])
            .unwrap();
        array.finish().unwrap();
    }
    folder
}

/// A scalar of the golden file, as the program prints bits/dim.
fn bits(key: &str) -> String {
    let file = fs::read(golden("golden_f32.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let bytes = tensors.tensor(key).unwrap().data().to_vec();
    let value = f32::from_le_bytes(bytes[..4].try_into().unwrap());
    format!("{value:.4} ±")
}

/// The flags of a checkpoint of the golden run.
const FLAGS: &str = "--image-size 8 --data images.npz --batch-size 4 --dropout 0";

#[test]
fn the_originals_checkpoints_become_runs() {
    let folder = folder();
    let folder = folder.path();
    let file = golden("tf_checkpoint_v2/params_cifar.ckpt");
    let said = succeeds(
        folder,
        &format!(
            "import {} --out resized --data photos --size 8",
            file.display()
        ),
    );
    contains(&said, "8x8x3 images");
    for (run, file) in [
        ("v1", "tf_checkpoint_v1/params_cifar.ckpt"),
        ("v2", "tf_checkpoint_v2/params_cifar.ckpt"),
    ] {
        let file = golden(file);
        let said = succeeds(
            folder,
            &format!("import {} --out {run} {FLAGS}", file.display()),
        );
        contains(&said, "37,588 parameters, 8x8x3 images");
        contains(&said, &format!("pixelcnn train --resume {run}"));
        contains(
            &succeeds(folder, &format!("eval {run}")),
            &bits("bpd_ema/step3"),
        );
        contains(
            &succeeds(folder, &format!("eval {run} --raw")),
            &bits("bpd_raw/step3"),
        );
        let info = succeeds(folder, &format!("info {run}"));
        contains(&info, "step                     3\n");
        contains(&info, "images seen              12\n");
        succeeds(folder, &format!("sample {run} --num 1"));
        let again = fails(folder, &format!("import {} --out {run}", file.display()));
        contains(&again, "already there and not an empty folder");
    }
    let resume = "train --resume v2 --steps 6 --samples 0";
    contains(&succeeds(folder, resume), "on from step 3");
    let metrics = fs::read_to_string(folder.join("v2/metrics.jsonl")).unwrap();
    contains(&metrics, "\"step\":6");
}

#[test]
fn checkpoints_of_pytorch_become_runs() {
    let folder = folder();
    let folder = folder.path();
    let port = golden("pytorch_port/rgb.pth");
    let tensors = pytorch::read(fs::File::open(&port).unwrap(), &mut Vec::new()).unwrap();
    let compiled = tensors.iter().map(|(name, tensor)| {
        let name = name.replace("weight_g", "parametrizations.weight.original0");
        let name = name.replace("weight_v", "parametrizations.weight.original1");
        (text(format!("_orig_mod.module.{name}")), single(tensor))
    });
    let mut items = others();
    items.push((text("state_dict"), Py::Ordered(compiled.collect())));
    fs::write(folder.join("last.ckpt"), save(&Py::Dict(items))).unwrap();

    succeeds(
        folder,
        &format!("import {} --out port {FLAGS}", port.display()),
    );
    let imported = pixelcnn(folder, &format!("import last.ckpt --out run {FLAGS}"));
    assert!(imported.status.success());
    let names =
        "\"epoch\", \"optimizer\", \"args\", \"best_bits\", \"device\", \"losses\", \"log\"";
    let said = String::from_utf8(imported.stderr).unwrap();
    assert_eq!(said, format!("left out: {names}\n"));
    let checkpoint = |run: &str| {
        fs::read(
            folder
                .join(run)
                .join("checkpoints/step-00000000.safetensors"),
        )
    };
    assert_eq!(checkpoint("run").unwrap(), checkpoint("port").unwrap());

    // Of others there may be many, and names can have anything in them.
    let odd = (0..30).map(|n| (text(format!("{n}\n")), Py::None));
    let model = tensors
        .iter()
        .map(|(name, t)| (text(name.clone()), single(t)));
    let mut items: Vec<_> = odd.collect();
    items.push((text("model"), Py::Dict(model.collect())));
    fs::write(folder.join("odd.pth"), save(&Py::Dict(items.clone()))).unwrap();
    let imported = pixelcnn(folder, &format!("import odd.pth --out odd {FLAGS}"));
    let said = String::from_utf8(imported.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    contains(&said, "left out: \"0\\n\", \"1\\n\"");
    contains(&said, "\"9\\n\" and 20 more\n");

    let extra = dict([("head.weight", single(&tensors["u_init.conv.bias"]))]);
    let (Py::Dict(model), Py::Dict(extra)) = (&mut items[30].1, extra) else {
        unreachable!()
    };
    model.extend(extra);
    fs::write(folder.join("odd.pth"), save(&Py::Dict(items))).unwrap();
    contains(
        &fails(folder, &format!("import odd.pth --out other {FLAGS}")),
        "tensor \"head.weight\" is not part of the model",
    );
}

#[test]
fn what_is_exported_is_imported_again() {
    let folder = folder();
    let folder = folder.path();
    let import = format!(
        "import {} --out run {FLAGS}",
        golden("tf_checkpoint_v2/params_cifar.ckpt").display()
    );
    succeeds(folder, &import);
    let checkpoint = |run: &str, step| {
        fs::read(folder.join(format!("{run}/checkpoints/step-0000000{step}.safetensors"))).unwrap()
    };

    // The whole state: the same bits.
    contains(
        &succeeds(folder, "export run --format tensorflow"),
        "run/export/tensorflow/params_cifar.ckpt (whole state, step 3)",
    );
    let exported = "import run/export/tensorflow/params_cifar.ckpt.index --out again";
    succeeds(folder, &format!("{exported} {FLAGS}"));
    assert_eq!(checkpoint("again", 3), checkpoint("run", 3));

    // All of it that the original could go on with.
    let small = "--batch-size 4 --init-batch-size 4 --nr-resnet 1 --nr-filters 5 --samples 0";
    let train = "train matrices --data images.npz --optimizer muon --steps 2";
    succeeds(folder, &format!("{train} {small}"));
    contains(
        &succeeds(folder, "export matrices --format tensorflow"),
        "params_cifar.ckpt (all but the optimizer's state, step 2)",
    );
    let import = "import matrices/export/tensorflow/params_cifar.ckpt.index --out moved";
    let flags = "--image-size 8 --data images.npz --batch-size 4";
    contains(&succeeds(folder, &format!("{import} {flags}")), "step    0");
    let eval = |run: &str| succeeds(folder, &format!("eval {run}"));
    assert_eq!(eval("moved"), eval("matrices").replace("step 2", "step 0"));

    // The averages, with what was measured.
    contains(
        &succeeds(folder, "export run"),
        "run/export/safetensors/model.safetensors (averaged weights, step 3)",
    );
    let card = || fs::read_to_string(folder.join("run/export/safetensors/README.md")).unwrap();
    contains(&card(), "| bits/dim | not measured |");
    succeeds(folder, "export run --measure --force");
    contains(&card(), &format!("| bits/dim | {}", bits("bpd_ema/step3")));
    contains(&card(), "on 4 test images of images.npz |");
    let exported = "import run/export/safetensors/model.safetensors --out weights";
    let said = succeeds(
        folder,
        &format!("{exported} --data images.npz --batch-size 4"),
    );
    contains(&said, "training begins with a new one");
    contains(
        &succeeds(folder, "eval weights --raw"),
        &bits("bpd_ema/step3"),
    );
    succeeds(folder, "train --resume weights --steps 1 --samples 0");

    // Training measures, and the card says so.
    succeeds(folder, "train --resume run --steps 4 --samples 0");
    succeeds(folder, "export run --force");
    let measured = card();
    contains(&measured, "± ");
    contains(&measured, "on all test images of images.npz |");
    succeeds(folder, "export run --raw --out raw");
    let raw = fs::read_to_string(folder.join("raw/README.md")).unwrap();
    contains(&raw, "| bits/dim | not measured |");
    contains(&raw, "parameters as trained last");

    // In half precision: next to no worse, and trained on.
    contains(
        &succeeds(folder, "export run --half --out half"),
        "half/model.safetensors (averaged weights in half precision, step 4)",
    );
    let half = || fs::read_to_string(folder.join("half/README.md")).unwrap();
    contains(&half(), "images.npz, before they were rounded |");
    contains(
        &half(),
        "Polyak average of the parameters, in half precision",
    );
    contains(&half(), "| 4, 16, 0.0 |");
    succeeds(folder, "export run --half --measure -o half --force");
    let size = |file: &str| fs::metadata(folder.join(file)).unwrap().len();
    let single = size("run/export/safetensors/model.safetensors");
    assert!(2 * size("half/model.safetensors") < single + 20_000);
    succeeds(
        folder,
        "import half/model.safetensors --out halved --data images.npz --batch-size 4",
    );
    let eval = |run: &str| {
        let said = succeeds(folder, &format!("eval {run}"));
        let figure = said
            .split("  ")
            .nth(1)
            .unwrap()
            .split(' ')
            .next()
            .unwrap()
            .to_owned();
        (figure.parse::<f64>().unwrap(), figure)
    };
    let (rounded, figure) = eval("halved");
    contains(&half(), &format!("| bits/dim | {figure} ±"));
    assert!((rounded - eval("run").0).abs() < 0.001);
    let resumed = succeeds(folder, "train --resume halved --steps 1 --samples 0");
    contains(&resumed, "on from step 0");

    succeeds(folder, "export run --format npz --raw --out raw");
    let mut npz = npyz::npz::NpzArchive::open(folder.join("raw/weights.npz")).unwrap();
    let array = npz.by_name("model/conv2d_0/V").unwrap().unwrap();
    assert_eq!(array.shape(), [2, 3, 4, 8]);

    let both = fails(folder, "export run --format tensorflow --raw");
    contains(&both, "hold both sets of weights");
    contains(
        &fails(folder, "export run --format npz --measure"),
        "model card",
    );
    contains(
        &fails(folder, "export run --format npz --half"),
        "--half: only safetensors has half precision",
    );
    fs::copy(
        folder.join("run/checkpoints/step-00000004.safetensors"),
        folder.join("alone.safetensors"),
    )
    .unwrap();
    contains(&fails(folder, "export alone.safetensors"), "--out");
}

#[test]
fn what_cannot_be_imported_is_said_on_one_line() {
    let folder = folder();
    let folder = folder.path();
    let import = |file: &Path, flags: &str| {
        fails(
            folder,
            &format!("import {} --out run {flags}", file.display()),
        )
    };
    contains(
        &import(&golden("pytorch/module.pth"), ""),
        "its pickle asks for \"model.Conv\"",
    );
    contains(
        &import(&golden("pytorch/views.pth"), ""),
        "it has a layer \"bfloat\", but no \"u_init.conv.weight_v\"",
    );
    contains(
        &import(&folder.join("images.npz"), ""),
        "without a PyTorch state dict",
    );
    contains(&import(&folder.join("missing"), ""), "No such file");
    contains(
        &import(&golden("golden_f32.safetensors"), ""),
        "config.json` cannot be read",
    );
    contains(
        &import(
            &golden("tf_checkpoint_v2/params_cifar.ckpt"),
            "--nonlinearity elu",
        ),
        "leave --nonlinearity out",
    );
    contains(
        &import(
            &golden("tf_checkpoint_v2/params_cifar.ckpt"),
            "--image-size 0",
        ),
        "between 1 and 16384",
    );
    contains(
        &import(&golden("tf_checkpoint_v2/params_cifar.ckpt"), "--dropout 1"),
        "dropout = 1",
    );
    assert!(!folder.join("run").exists());
    for (command, part) in [("import", "Epochs count from"), ("export", "--nr-gpu")] {
        let help = succeeds(folder, &format!("{command} --help"));
        contains(&help, "Examples:\n  pixelcnn ");
        contains(&help, part);
    }
}
