//! TensorFlow's checkpoints. The older form (V1) is one sorted table with the tensors in it as
//! protocol buffers. The current one (V2) is a table `PREFIX.index` that says where each tensor
//! lies in `PREFIX.data-00000-of-00001`, with a CRC-32C of each.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use prost::Message;

use super::{Fault, Float, Tensor, Tensors, WeightsError, numel, open, original, table, write};

const FLOAT: i32 = 1;
const DOUBLE: i32 = 2;
const INT64: i32 = 9;
const BFLOAT16: i32 = 14;
const HALF: i32 = 19;

/// How a type's values are stored; none where they are no floating-point numbers.
fn float(dtype: i32) -> Option<Float> {
    match dtype {
        FLOAT => Some(Float::F32),
        DOUBLE => Some(Float::F64),
        BFLOAT16 => Some(Float::BF16),
        HALF => Some(Float::F16),
        _ => None,
    }
}

/// The most that is read of what a checkpoint says about all its tensors together: several times
/// that of the largest model.
const MAX_META: usize = 8 << 20;

/// The parts of TensorFlow's protocol buffers that are needed, with their field numbers there.
mod proto {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Dim {
        #[prost(int64, tag = "1")]
        pub size: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Shape {
        #[prost(message, repeated, tag = "2")]
        pub dim: Vec<Dim>,
    }

    /// Of a slice along one axis; the whole axis has neither.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Extent {
        #[prost(int64, tag = "1")]
        pub start: i64,
        #[prost(int64, optional, tag = "2")]
        pub length: Option<i64>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Slice {
        #[prost(message, repeated, tag = "1")]
        pub extent: Vec<Extent>,
    }

    /// `BundleHeaderProto`, of V2.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Header {
        #[prost(int32, tag = "1")]
        pub num_shards: i32,
        /// 0 is little-endian.
        #[prost(int32, tag = "2")]
        pub endianness: i32,
        #[prost(message, optional, tag = "3")]
        pub version: Option<Version>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Version {
        #[prost(int32, tag = "1")]
        pub producer: i32,
        #[prost(int32, tag = "2")]
        pub min_consumer: i32,
    }

    /// `BundleEntryProto`, of V2.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Entry {
        #[prost(int32, tag = "1")]
        pub dtype: i32,
        #[prost(message, optional, tag = "2")]
        pub shape: Option<Shape>,
        #[prost(int32, tag = "3")]
        pub shard_id: i32,
        #[prost(int64, tag = "4")]
        pub offset: i64,
        #[prost(int64, tag = "5")]
        pub size: i64,
        #[prost(fixed32, tag = "6")]
        pub crc32c: u32,
        #[prost(message, repeated, tag = "7")]
        pub slices: Vec<Slice>,
    }

    /// `SavedTensorSlices`, of V1: under the empty key what there is, under each other key a part.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct SavedTensorSlices {
        #[prost(message, optional, tag = "1")]
        pub meta: Option<Meta>,
        #[prost(message, optional, tag = "2")]
        pub data: Option<SavedSlice>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Meta {
        #[prost(message, repeated, tag = "1")]
        pub tensor: Vec<SliceMeta>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct SliceMeta {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(message, optional, tag = "2")]
        pub shape: Option<Shape>,
        #[prost(int32, tag = "3")]
        pub dtype: i32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct SavedSlice {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(message, optional, tag = "2")]
        pub slice: Option<Slice>,
        #[prost(message, optional, tag = "3")]
        pub data: Option<TensorProto>,
    }

    /// Its values are bytes, or numbers of one of the types.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct TensorProto {
        #[prost(bytes = "vec", tag = "4")]
        pub tensor_content: Vec<u8>,
        #[prost(float, repeated, tag = "5")]
        pub float_val: Vec<f32>,
        #[prost(double, repeated, tag = "6")]
        pub double_val: Vec<f64>,
        /// The bits of halves of either kind.
        #[prost(int32, repeated, tag = "13")]
        pub half_val: Vec<i32>,
    }
}

impl proto::Shape {
    fn of(shape: &[usize]) -> proto::Shape {
        let dim = |&size: &usize| proto::Dim { size: size as i64 };
        proto::Shape {
            dim: shape.iter().map(dim).collect(),
        }
    }

    /// The extents; none where one is not known.
    fn extents(&self) -> Option<Vec<usize>> {
        let extents = self.dim.iter().map(|dim| usize::try_from(dim.size).ok());
        extents.collect()
    }
}

impl proto::TensorProto {
    /// The values, of type `float`, in single precision.
    fn values(self, float: Float) -> Result<Vec<f32>, Fault> {
        let bytes = self.tensor_content;
        if !bytes.is_empty() {
            return Ok(float.read(&mut &bytes[..], bytes.len() / float.size())?);
        }
        let halves = self.half_val.iter().map(|&bits| bits as u16);
        Ok(match float {
            Float::F32 => self.float_val,
            Float::F64 => self.double_val.iter().map(|&v| v as f32).collect(),
            Float::F16 => halves.map(|bits| f16::from_bits(bits).to_f32()).collect(),
            Float::BF16 => halves.map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        })
    }
}

impl proto::Slice {
    /// Whether it is the whole of a tensor.
    fn is_full(&self) -> bool {
        let mut extents = self.extent.iter();
        extents.all(|extent| extent.start == 0 && extent.length.is_none())
    }
}

fn decode<T: Message + Default>(bytes: &[u8]) -> Result<T, Fault> {
    T::decode(bytes).map_err(|_| Fault::Damaged("an entry is not of a checkpoint".into()))
}

fn meta_of(key: &[u8], value: &[u8]) -> Result<(), Fault> {
    match key.is_empty() && value.len() <= MAX_META {
        true => Ok(()),
        false => Err(Fault::Refused("it is not a checkpoint's table".into())),
    }
}

fn wrong(tensor: &str, reason: &str) -> Fault {
    Fault::Tensor {
        tensor: tensor.into(),
        reason: reason.into(),
    }
}

/// Adds a tensor that has no floating-point numbers to what is left out, where it is not one of the
/// original's.
fn leave_out(name: String, unused: &mut Vec<String>) {
    if !original::is_unnamed(&name) {
        unused.push(name);
    }
}

/// Reads the tensors of a V1 checkpoint that have floating-point numbers, as single precision, and
/// adds the names of others to `unused`.
///
/// # Errors
/// Where the file is damaged or the model was split over several parts.
pub fn v1<R: Read + Seek>(file: R, unused: &mut Vec<String>) -> Result<Tensors, Fault> {
    // Type and shape, while the values are yet to come.
    type Announced = (Option<Float>, Vec<usize>);
    let mut expected: Option<BTreeMap<String, Announced>> = None;
    let mut tensors = Tensors::new();
    table::read(file, |key, value| {
        let Some(expected) = &mut expected else {
            meta_of(key, value)?;
            let slices: proto::SavedTensorSlices = decode(value)?;
            let all = slices.meta.unwrap_or_default().tensor.into_iter();
            let all = all.map(|tensor| {
                let shape = tensor.shape.unwrap_or_default().extents();
                let shape = shape.ok_or_else(|| wrong(&tensor.name, "has no shape"))?;
                Ok((tensor.name, (float(tensor.dtype), shape)))
            });
            expected = Some(all.collect::<Result<_, Fault>>()?);
            return Ok(());
        };
        let slices: proto::SavedTensorSlices = decode(value)?;
        let slice = slices.data.unwrap_or_default();
        let Some((float, shape)) = expected.remove(&slice.name) else {
            return Err(wrong(&slice.name, "is stored twice or not announced"));
        };
        let Some(float) = float else {
            leave_out(slice.name, unused);
            return Ok(());
        };
        if !slice.slice.unwrap_or_default().is_full() {
            return Err(wrong(&slice.name, "is stored in several parts"));
        }
        let values = slice.data.unwrap_or_default().values(float)?;
        if numel(&shape) != Some(values.len()) {
            let reason = format!("has {} values, not {shape:?}", values.len());
            return Err(wrong(&slice.name, &reason));
        }
        tensors.insert(slice.name, Tensor { shape, values });
        Ok(())
    })?;
    let mut missing = expected.into_iter().flatten();
    match missing.find(|(_, (float, _))| float.is_some()) {
        Some((missing, _)) => Err(wrong(&missing, "has no values")),
        None => Ok(tensors),
    }
}

/// Reads the tensors of a V2 checkpoint that have floating-point numbers, as single precision, and
/// adds the names of others to `unused`. `shard(i, n)` opens the `i`-th of `n` files of values.
///
/// # Errors
/// Where a file is damaged or the model was split over several parts.
pub fn v2<R: Read + Seek, S: Read + Seek>(
    index: R,
    mut shard: impl FnMut(i32, i32) -> io::Result<S>,
    unused: &mut Vec<String>,
) -> Result<Tensors, Fault> {
    let mut header: Option<proto::Header> = None;
    type Announced = (String, Float, Vec<usize>, proto::Entry);
    let mut shards: BTreeMap<i32, Vec<Announced>> = BTreeMap::new();
    let mut room = MAX_META;
    table::read(index, |key, value| {
        let Some(header) = &header else {
            meta_of(key, value)?;
            let found: proto::Header = decode(value)?;
            if found.endianness != 0 {
                return Err(Fault::Refused("it was written big-endian".into()));
            }
            header = Some(found);
            return Ok(());
        };
        room = room.checked_sub(key.len() + value.len()).ok_or_else(|| {
            Fault::Refused("it has more tensors than the largest PixelCNN++".into())
        })?;
        let entry: proto::Entry = decode(value)?;
        let name = String::from_utf8_lossy(key).into_owned();
        let Some(float) = float(entry.dtype) else {
            leave_out(name, unused);
            return Ok(());
        };
        if !entry.slices.is_empty() {
            return Err(wrong(&name, "is stored in several parts"));
        }
        let shape = entry.shape.clone().unwrap_or_default().extents();
        let shape = shape.ok_or_else(|| wrong(&name, "has no shape"))?;
        let bytes = numel(&shape).and_then(|n| n.checked_mul(float.size()));
        if bytes.is_none_or(|bytes| bytes as i64 != entry.size) {
            let reason = format!("has {} bytes, not {shape:?} numbers", entry.size);
            return Err(wrong(&name, &reason));
        }
        if !(0..header.num_shards).contains(&entry.shard_id) {
            return Err(wrong(&name, "lies in no file"));
        }
        let entries = shards.entry(entry.shard_id).or_default();
        entries.push((name, float, shape, entry));
        Ok(())
    })?;
    let num_shards = header.map_or(0, |header| header.num_shards);
    let mut tensors = Tensors::new();
    for (id, mut entries) in shards {
        let mut file = shard(id, num_shards)?;
        let size = file.seek(SeekFrom::End(0))?;
        entries.sort_by_key(|(_, _, _, entry)| (entry.offset, entry.size));
        let mut from = 0;
        for (name, float, shape, entry) in entries {
            let offset = u64::try_from(entry.offset).unwrap_or(u64::MAX);
            // No two tensors share bytes, so that all of them together are no larger than the file.
            if offset < from {
                return Err(wrong(&name, "overlaps another one"));
            }
            from = offset.saturating_add(entry.size as u64);
            if from > size {
                return Err(Fault::Truncated);
            }
            file.seek(SeekFrom::Start(offset))?;
            let mut bytes = Summed {
                file: &mut file,
                crc: 0,
            };
            let values = float.read(&mut bytes, entry.size as usize / float.size())?;
            if table::masked_crc(bytes.crc) != entry.crc32c {
                return Err(Fault::Damaged(format!(
                    "the checksum of tensor {name:?} does not hold"
                )));
            }
            tensors.insert(name, Tensor { shape, values });
        }
    }
    Ok(tensors)
}

/// What is read from a file, with its checksum.
struct Summed<R> {
    file: R,
    crc: u32,
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(bytes)?;
        self.crc = crc32c::crc32c_append(self.crc, &bytes[..read]);
        Ok(read)
    }
}

/// The common prefix of the files of a V2 checkpoint, where `path` is that prefix or one of them.
pub fn prefix(path: &Path) -> Option<PathBuf> {
    let text = path.to_str()?;
    let stem = match text.strip_suffix(".index") {
        Some(stem) => stem,
        None => text.rsplit_once(".data-").map_or(text, |(stem, _)| stem),
    };
    let index = PathBuf::from(format!("{stem}.index"));
    index.is_file().then(|| stem.into())
}

/// Reads the V2 checkpoint whose files begin with `prefix`.
///
/// # Errors
/// As [`v2`].
pub fn read_v2(prefix: &Path, unused: &mut Vec<String>) -> Result<Tensors, Fault> {
    let file = |end: &str| {
        let mut path = prefix.as_os_str().to_owned();
        path.push(end);
        open(path.as_ref())
    };
    let shard = |i: i32, n: i32| {
        let end = format!(".data-{i:05}-of-{n:05}");
        file(&end).map_err(|fault| match fault {
            Fault::Io(error) => io::Error::new(error.kind(), format!("its part `{end}`: {error}")),
            fault => io::Error::other(fault),
        })
    };
    v2(file(".index")?, shard, unused)
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Variable<'a> {
    /// Its name.
    pub name: String,
    /// Its extents.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Values<'a>,
}

/// Values of a [`Variable`].
#[derive(Debug, Clone, PartialEq)]
pub enum Values<'a> {
    /// `DT_FLOAT`.
    Float(Cow<'a, [f32]>),
    /// `DT_INT64`.
    Int64(Vec<i64>),
}

/// Writes a V2 checkpoint in a folder, `NAME.index` and `NAME.data-00000-of-00001`, and the file
/// `checkpoint` that names it as the folder's newest.
///
/// # Errors
/// [`WeightsError::Write`].
pub fn write_v2(
    folder: &Path,
    name: &str,
    mut variables: Vec<Variable>,
) -> Result<(), WeightsError> {
    variables.sort_by(|a, b| a.name.cmp(&b.name));
    let header = proto::Header {
        num_shards: 1,
        endianness: 0,
        version: Some(proto::Version {
            producer: 1,
            min_consumer: 0,
        }),
    };
    let mut entries = vec![(&b""[..], header.encode_to_vec())];
    write(folder, &format!("{name}.data-00000-of-00001"), |w| {
        let mut offset = 0;
        for variable in &variables {
            let (mut crc, mut size) = (0, 0);
            let mut put = |bytes: &[u8]| {
                crc = crc32c::crc32c_append(crc, bytes);
                size += bytes.len() as i64;
                w.write_all(bytes)
            };
            let dtype = match &variable.values {
                Values::Float(values) => {
                    let mut buffer = Vec::new();
                    for values in values.chunks(1 << 12) {
                        buffer.clear();
                        buffer.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                        put(&buffer)?;
                    }
                    FLOAT
                }
                Values::Int64(values) => {
                    let mut values = values.iter();
                    values.try_for_each(|value| put(&value.to_le_bytes()))?;
                    INT64
                }
            };
            let entry = proto::Entry {
                dtype,
                shape: Some(proto::Shape::of(&variable.shape)),
                shard_id: 0,
                offset,
                size,
                crc32c: table::masked_crc(crc),
                slices: Vec::new(),
            };
            entries.push((variable.name.as_bytes(), entry.encode_to_vec()));
            offset += size;
        }
        Ok(())
    })?;
    write(folder, &format!("{name}.index"), |w| {
        table::write(w, entries)
    })?;
    write(folder, "checkpoint", |w| {
        write!(
            w,
            "model_checkpoint_path: {name:?}\nall_model_checkpoint_paths: {name:?}\n"
        )
    })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::table::tests::{Entries, of_one_block, snappy, written};
    use super::*;

    fn tensors() -> Tensors {
        let tensor = |n: usize| Tensor {
            shape: vec![n, 2],
            values: (0..2 * n).map(|v| v as f32 - 0.5).collect(),
        };
        let name = |n| format!("model/conv2d_{n}/V");
        (0..6).map(|n| (name(n), tensor(n))).collect()
    }

    /// The entries of a V1 checkpoint.
    fn v1_entries(tensors: &Tensors) -> Entries {
        let all = tensors.iter().map(|(name, tensor)| proto::SliceMeta {
            name: name.clone(),
            shape: Some(proto::Shape::of(&tensor.shape)),
            dtype: FLOAT,
        });
        let meta = proto::SavedTensorSlices {
            meta: Some(proto::Meta {
                tensor: all.collect(),
            }),
            data: None,
        };
        let mut entries = vec![(Vec::new(), meta.encode_to_vec())];
        entries.extend(tensors.iter().map(|(name, tensor)| {
            let data = proto::SavedSlice {
                name: name.clone(),
                slice: Some(proto::Slice {
                    extent: vec![proto::Extent::default(); tensor.shape.len()],
                }),
                data: Some(proto::TensorProto {
                    float_val: tensor.values.clone(),
                    ..Default::default()
                }),
            };
            let slices = proto::SavedTensorSlices {
                meta: None,
                data: Some(data),
            };
            (name.clone().into_bytes(), slices.encode_to_vec())
        }));
        entries
    }

    /// The golden checkpoint with its numbers in another type, and how exact that is.
    fn golden(dtype: i32, bytes: fn(f32) -> Vec<u8>) -> (Tensors, Tensors) {
        let file = |end: &str| {
            let folder =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tf_checkpoint_v2");
            std::fs::read(folder.join(format!("params_cifar.ckpt.{end}"))).unwrap()
        };
        let (index, old) = (file("index"), file("data-00000-of-00001"));
        let mut entries = super::super::table::tests::entries_of(&index).unwrap();
        let mut data = Vec::new();
        let mut v1 = proto::Meta::default();
        let mut v1_entries = Entries::new();
        for (key, value) in &mut entries[1..] {
            let mut entry: proto::Entry = decode(value).unwrap();
            let old = &old[entry.offset as usize..][..entry.size as usize];
            let floats = old.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
            let new: Vec<u8> = floats.clone().flat_map(bytes).collect();
            entry.dtype = dtype;
            entry.offset = data.len() as i64;
            entry.size = new.len() as i64;
            entry.crc32c = table::masked_crc(crc32c::crc32c(&new));
            *value = entry.encode_to_vec();
            data.extend(&new);

            // The older form has the numbers, or in some versions their bytes.
            let name = String::from_utf8(key.clone()).unwrap();
            let halves = || {
                new.as_chunks()
                    .0
                    .iter()
                    .map(|&b| u16::from_le_bytes(b).into())
            };
            let mut values = proto::TensorProto::default();
            match dtype {
                _ if name.ends_with("/g") => values.tensor_content = new.clone(),
                FLOAT => values.float_val = floats.collect(),
                DOUBLE => values.double_val = floats.map(f64::from).collect(),
                _ => values.half_val = halves().collect(),
            }
            v1.tensor.push(proto::SliceMeta {
                name: name.clone(),
                shape: entry.shape,
                dtype,
            });
            let slice = proto::SavedSlice {
                name,
                slice: None,
                data: Some(values),
            };
            let slices = proto::SavedTensorSlices {
                meta: None,
                data: Some(slice),
            };
            v1_entries.push((key.clone(), slices.encode_to_vec()));
        }
        let meta = proto::SavedTensorSlices {
            meta: Some(v1),
            data: None,
        };
        v1_entries.insert(0, (Vec::new(), meta.encode_to_vec()));
        let mut unused = Vec::new();
        let shard = |_, _| Ok(Cursor::new(&data));
        let v2 = v2(Cursor::new(written(&entries)), shard, &mut unused).unwrap();
        let v1 = super::v1(Cursor::new(written(&v1_entries)), &mut unused).unwrap();
        assert!(unused.is_empty());
        (v1, v2)
    }

    #[test]
    fn numbers_of_any_precision_come_in_single() {
        let (_, exact) = golden(FLOAT, |v| v.to_le_bytes().into());
        assert_eq!(exact.len(), 685);
        type Bytes = fn(f32) -> Vec<u8>;
        let cases: [(i32, Bytes, f32); 4] = [
            (FLOAT, |v| v.to_le_bytes().into(), 0.0),
            (DOUBLE, |v| f64::from(v).to_le_bytes().into(), 0.0),
            (
                HALF,
                |v| f16::from_f32(v).to_le_bytes().into(),
                1.0 / 2048.0,
            ),
            (
                BFLOAT16,
                |v| bf16::from_f32(v).to_le_bytes().into(),
                1.0 / 256.0,
            ),
        ];
        for (dtype, bytes, rounding) in cases {
            let (v1, v2) = golden(dtype, bytes);
            assert_eq!(v1, v2);
            assert!(v2.keys().eq(exact.keys()));
            for (name, tensor) in &v2 {
                assert_eq!(tensor.shape, exact[name].shape);
                for (found, exact) in tensor.values.iter().zip(&exact[name].values) {
                    // The smallest halves are 6e-8 apart.
                    let bound = rounding * (exact.abs() + 1e-4);
                    assert!((found - exact).abs() <= bound, "{name}: {found}, {exact}");
                }
            }
            let unsaid = super::super::Unsaid {
                size: Some([8, 8]),
                ..Default::default()
            };
            let state = original::state(v2, &unsaid).unwrap();
            assert_eq!((state.step, state.config.nr_filters), (3, 8));
        }
    }

    #[test]
    fn what_has_no_floating_point_numbers_is_named() {
        let variable = |name: &str, values: Vec<i64>| Variable {
            name: name.into(),
            shape: vec![values.len()],
            values: Values::Int64(values),
        };
        let folder = tempfile::tempdir().unwrap();
        let labels = variable("Variable", vec![0, 1]);
        let variables = vec![variable("global_step", vec![7]), labels];
        write_v2(folder.path(), "x", variables).unwrap();
        let mut unused = Vec::new();
        let tensors = read_v2(&folder.path().join("x"), &mut unused).unwrap();
        assert_eq!((tensors.len(), unused), (0, vec!["global_step".to_owned()]));
    }

    #[test]
    fn damaged_v1_files_are_refused() {
        let entries = v1_entries(&tensors());
        for file in [written(&entries), of_one_block(&entries, 1, snappy)] {
            let read = |file: &[u8]| v1(Cursor::new(file), &mut Vec::new());
            assert_eq!(read(&file).unwrap(), tensors());
            for at in 0..file.len() {
                for bit in 0..8 {
                    let mut flipped = file.clone();
                    flipped[at] ^= 1 << bit;
                    if let Ok(found) = read(&flipped) {
                        assert_eq!(found, tensors(), "bit {bit} of byte {at}");
                    }
                }
                assert!(read(&file[..at]).is_err());
            }
            // Entries that are damaged, but whose checksum was made to hold.
            for (n, at) in
                (0..entries.len()).flat_map(|n| (0..entries[n].1.len()).map(move |at| (n, at)))
            {
                let mut forged = entries.clone();
                forged[n].1[at] ^= 1 << (at % 8);
                let _ = read(&written(&forged));
                forged[n].1.truncate(at);
                let _ = read(&written(&forged));
            }
        }
    }

    #[test]
    fn v1_files_that_contradict_themselves_are_refused() {
        let forged = |change: &dyn Fn(&mut Entries)| {
            let mut entries = v1_entries(&tensors());
            change(&mut entries);
            v1(Cursor::new(written(&entries)), &mut Vec::new())
                .unwrap_err()
                .to_string()
        };
        let missing = forged(&|entries| drop(entries.pop()));
        assert!(
            missing.contains("\"model/conv2d_5/V\" has no values"),
            "{missing}"
        );
        let twice = forged(&|entries| {
            let (_, value) = entries[3].clone();
            entries.push((b"z".to_vec(), value));
        });
        assert!(
            twice.contains("\"model/conv2d_2/V\" is stored twice"),
            "{twice}"
        );
        let other = forged(&|entries| entries[2].1 = entries[3].1.clone());
        assert!(
            other.contains("\"model/conv2d_2/V\" is stored twice"),
            "{other}"
        );
        let headless = forged(&|entries| drop(entries.remove(0)));
        assert!(headless.contains("not a checkpoint's table"), "{headless}");
        let part = forged(&|entries| {
            let mut slices: proto::SavedTensorSlices = decode(&entries[2].1).unwrap();
            let slice = slices.data.as_mut().unwrap().slice.as_mut().unwrap();
            slice.extent[0].length = Some(1);
            entries[2].1 = slices.encode_to_vec();
        });
        assert!(part.contains("is stored in several parts"), "{part}");
    }

    #[test]
    fn v2_files_that_contradict_themselves_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let tensors = tensors();
        let variables = tensors.iter().map(|(name, tensor)| Variable {
            name: name.clone(),
            shape: tensor.shape.clone(),
            values: Values::Float((&tensor.values).into()),
        });
        write_v2(folder.path(), "x", variables.collect()).unwrap();
        let index = std::fs::read(folder.path().join("x.index")).unwrap();
        let data = std::fs::read(folder.path().join("x.data-00000-of-00001")).unwrap();
        let original = super::super::table::tests::entries_of(&index).unwrap();
        let read = |entries: &Entries| {
            let shard = |_, _| Ok(Cursor::new(&data));
            v2(Cursor::new(written(entries)), shard, &mut Vec::new())
        };
        assert_eq!(read(&original).unwrap(), tensors);
        let forged = |change: fn(&mut proto::Entry)| {
            let mut entries = original.clone();
            let mut entry = decode(&entries[3].1).unwrap();
            change(&mut entry);
            entries[3].1 = entry.encode_to_vec();
            read(&entries).unwrap_err().to_string()
        };
        fn dims(dims: &[i64]) -> Option<proto::Shape> {
            let dim = dims.iter().map(|&size| proto::Dim { size });
            Some(proto::Shape { dim: dim.collect() })
        }
        type Change = fn(&mut proto::Entry);
        let cases: [(Change, &str); 11] = [
            (|e| e.offset = 0, "overlaps another one"),
            (|e| e.offset = -1, "is truncated"),
            (|e| e.offset = i64::MAX, "is truncated"),
            (|e| e.size = -16, "not [2, 2] numbers"),
            (|e| e.shape = dims(&[1 << 40]), "numbers"),
            (
                |e| {
                    e.shape = dims(&[1 << 40]);
                    e.size = 4 << 40;
                },
                "is truncated",
            ),
            (|e| e.shape = dims(&[i64::MAX, i64::MAX, 4]), "numbers"),
            (|e| e.shape = dims(&[-1, -4]), "has no shape"),
            (|e| e.shard_id = 1, "lies in no file"),
            (
                |e| e.crc32c ^= 1,
                "the checksum of tensor \"model/conv2d_2/V\" does not hold",
            ),
            (|e| e.slices.push(proto::Slice::default()), "several parts"),
        ];
        for (change, part) in cases {
            let error = forged(change);
            assert!(error.contains(part), "{part}: {error}");
        }
        for (n, at) in
            (0..original.len()).flat_map(|n| (0..original[n].1.len()).map(move |at| (n, at)))
        {
            let mut forged = original.clone();
            forged[n].1[at] ^= 1 << (at % 8);
            let _ = read(&forged);
            forged[n].1.truncate(at);
            let _ = read(&forged);
        }
    }
}
