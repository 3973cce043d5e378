//! Writes files as `torch.save` does, for the tests of what reads them.

#![allow(dead_code)] // Not every test needs all of it.

use std::io::{Cursor, Write};

use pixelcnn::weights::Tensor;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// A value of Python's.
#[derive(Debug, Clone)]
pub enum Py {
    None,
    Bool(bool),
    Int(i32),
    Float(f64),
    Text(String),
    Tuple(Vec<Py>),
    List(Vec<Py>),
    Dict(Vec<(Py, Py)>),
    /// An `OrderedDict` with attributes, as state dicts are.
    Ordered(Vec<(Py, Py)>),
    /// A tensor in a storage of its own: `FloatStorage` and the elements' bytes.
    Tensor(&'static str, Vec<usize>, Vec<u8>),
    Parameter(Box<Py>),
    /// `MODULE.NAME(arguments)`.
    Call(&'static str, &'static str, Vec<Py>),
    /// An object of a class `MODULE.NAME`, with its attributes.
    Object(&'static str, &'static str, Box<Py>),
}

pub fn text(text: impl Into<String>) -> Py {
    Py::Text(text.into())
}

/// A dict, and most of what there is beside a model.
pub fn dict<const N: usize>(items: [(&str, Py); N]) -> Py {
    Py::Dict(items.map(|(key, value)| (text(key), value)).into())
}

pub fn single(tensor: &Tensor) -> Py {
    let bytes = tensor.values.iter().flat_map(|v| v.to_le_bytes());
    Py::Tensor("FloatStorage", tensor.shape.clone(), bytes.collect())
}

/// One whole number.
pub fn count(number: i64) -> Py {
    Py::Tensor("LongStorage", Vec::new(), number.to_le_bytes().into())
}

/// What lies beside the state dict of a training: the state of Adam for two parameters, settings,
/// numbers of NumPy's.
pub fn others() -> Vec<(Py, Py)> {
    let moment = || {
        single(&Tensor {
            shape: vec![2],
            values: vec![0.5, -0.5],
        })
    };
    let of_parameter = || {
        dict([
            ("step", count(7)),
            ("exp_avg", moment()),
            ("exp_avg_sq", moment()),
        ])
    };
    let group = dict([
        ("lr", Py::Float(1e-3)),
        ("betas", Py::Tuple(vec![Py::Float(0.95), Py::Float(0.9995)])),
        ("amsgrad", Py::Bool(false)),
        ("foreach", Py::None),
        ("params", Py::List(vec![Py::Int(0), Py::Int(1)])),
    ]);
    let state = Py::Dict((0..2).map(|n| (Py::Int(n), of_parameter())).collect());
    let optimizer = dict([("state", state), ("param_groups", Py::List(vec![group]))]);
    let path = Py::Call("pathlib", "PosixPath", vec![text("data"), text("cifar")]);
    let arguments = dict([("nr_filters", Py::Int(160)), ("data_dir", path)]);
    // `numpy.float64(2.92)`, whose bytes are a text in Python 2's pickles.
    let dtype = Py::Call(
        "numpy",
        "dtype",
        vec![text("f8"), Py::Bool(false), Py::Bool(true)],
    );
    let bytes = Py::Call(
        "_codecs",
        "encode",
        vec![text("\u{5c}\u{8f}\u{c2}\u{f5}(\\\u{7}@"), text("latin1")],
    );
    let best = Py::Call("numpy._core.multiarray", "scalar", vec![dtype, bytes]);
    let Py::Dict(others) = dict([
        ("epoch", Py::Int(12)),
        ("optimizer", optimizer),
        (
            "args",
            Py::Object("argparse", "Namespace", Box::new(arguments)),
        ),
        ("best_bits", best),
        (
            "device",
            Py::Call("torch", "device", vec![text("cuda"), Py::Int(0)]),
        ),
        ("losses", Py::List(vec![Py::Float(3.0); 2000])),
        ("log", text("x".repeat(70_000))),
    ]) else {
        unreachable!()
    };
    others
}

#[derive(Default)]
struct Pickler {
    bytes: Vec<u8>,
    /// Types, lengths and bytes.
    storages: Vec<(&'static str, u64, Vec<u8>)>,
    legacy: bool,
}

impl Pickler {
    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    fn text(&mut self, text: &str) {
        self.put(b"X");
        self.put(&(text.len() as u32).to_le_bytes());
        self.put(text.as_bytes());
    }

    fn global(&mut self, module: &str, name: &str) {
        self.put(format!("c{module}\n{name}\n").as_bytes());
    }

    fn all<'a>(&mut self, open: &[u8], values: impl IntoIterator<Item = &'a Py>, close: &[u8]) {
        self.put(open);
        values.into_iter().for_each(|value| self.value(value));
        self.put(close);
    }

    fn int(&mut self, number: i32) {
        self.put(b"J");
        self.put(&number.to_le_bytes());
    }

    fn ints(&mut self, numbers: impl IntoIterator<Item = usize>) {
        self.put(b"(");
        numbers.into_iter().for_each(|n| self.int(n as i32));
        self.put(b"t");
    }

    fn value(&mut self, value: &Py) {
        match value {
            Py::None => self.put(b"N"),
            Py::Bool(false) => self.put(b"\x89"),
            Py::Bool(true) => self.put(b"\x88"),
            Py::Int(number) => self.int(*number),
            Py::Float(number) => {
                self.put(b"G");
                self.put(&number.to_be_bytes());
            }
            Py::Text(text) => self.text(text),
            Py::Tuple(values) => self.all(b"(", values, b"t"),
            Py::List(values) => self.all(b"](", values, b"e"),
            Py::Dict(items) => {
                let items = items.iter().flat_map(|(key, value)| [key, value]);
                self.all(b"}(", items, b"u");
            }
            Py::Ordered(items) => {
                self.put(b"ccollections\nOrderedDict\n)R(");
                let items = items.iter().flat_map(|(key, value)| [key, value]);
                self.all(b"", items, b"u");
                self.value(&dict([("_metadata", Py::None)]));
                self.put(b"b");
            }
            Py::Tensor(kind, shape, bytes) => {
                let size = match *kind {
                    "LongStorage" | "DoubleStorage" => 8,
                    "FloatStorage" => 4,
                    _ => 2,
                };
                let len = bytes.len() / size;
                self.global("torch._utils", "_rebuild_tensor_v2");
                self.put(b"((");
                self.text("storage");
                self.global("torch", kind);
                self.text(&self.storages.len().to_string());
                self.text("cuda:0");
                self.int(len as i32);
                self.put(match self.legacy {
                    true => b"NtQ",
                    false => b"tQ",
                });
                self.int(0);
                self.ints(shape.iter().copied());
                self.ints((1..=shape.len()).map(|axis| shape[axis..].iter().product()));
                self.put(b"\x89ccollections\nOrderedDict\n)RtR");
                self.storages.push((kind, len as u64, bytes.clone()));
            }
            Py::Parameter(tensor) => {
                self.global("torch._utils", "_rebuild_parameter");
                self.all(b"(", [&**tensor], b"\x88ccollections\nOrderedDict\n)RtR");
            }
            Py::Call(module, name, arguments) => {
                self.global(module, name);
                self.all(b"(", arguments, b"tR");
            }
            Py::Object(module, name, attributes) => {
                self.global(module, name);
                self.all(b")\x81", [&**attributes], b"b");
            }
        }
    }
}

fn pickled(value: &Py) -> Vec<u8> {
    let mut pickler = Pickler::default();
    pickler.all(b"\x80\x02", [value], b".");
    pickler.bytes
}

/// As `torch.save(value, file)`.
pub fn save(value: &Py) -> Vec<u8> {
    let mut pickler = Pickler::default();
    pickler.all(b"\x80\x02", [value], b".");
    let mut file = Cursor::new(Vec::new());
    let mut archive = ZipWriter::new(&mut file);
    let mut put = |name: String, bytes: &[u8]| {
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        archive.start_file(name, stored).unwrap();
        archive.write_all(bytes).unwrap();
    };
    put("archive/data.pkl".into(), &pickler.bytes);
    put("archive/byteorder".into(), b"little");
    for (n, (_, _, bytes)) in pickler.storages.iter().enumerate() {
        put(format!("archive/data/{n}"), bytes);
    }
    put("archive/version".into(), b"3\n");
    archive.finish().unwrap();
    file.into_inner()
}

/// As `torch.save(value, file, _use_new_zipfile_serialization=False)`.
pub fn save_legacy(value: &Py) -> Vec<u8> {
    let mut pickler = Pickler {
        legacy: true,
        ..Pickler::default()
    };
    let magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
    let version = b"\x80\x02M\xe9\x03.";
    pickler.put(&[&magic[..], version].concat());
    pickler.put(&pickled(&dict([("little_endian", Py::Bool(true))])));
    pickler.all(b"\x80\x02", [value], b".");
    let keys = (0..pickler.storages.len()).map(|n| text(n.to_string()));
    pickler.put(&pickled(&Py::List(keys.collect())));
    for (_, len, bytes) in &pickler.storages {
        pickler.bytes.extend(len.to_le_bytes());
        pickler.bytes.extend(bytes);
    }
    pickler.bytes
}
