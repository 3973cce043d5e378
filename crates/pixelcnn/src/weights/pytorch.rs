//! State dicts as `torch.save` writes them: a zip archive with a pickle and a file for each storage,
//! or, before PyTorch 1.6, several pickles with the storages behind them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Seek, SeekFrom};

use half::{bf16, f16};
use zip::ZipArchive;
use zip::result::ZipError;

use super::pickle::{Dtype, Pickle, Storage, Value, View};
use super::{Fault, Tensor, Tensors};

/// Begins a file of the older form, as a pickled number.
const MAGIC: i64 = 0x1950_a86a_20f9_469c_fc6c_u128 as i64;

/// The most entries of an archive: several times those of the largest model.
const MAX_ENTRIES: u64 = 1 << 17;

fn wrong(tensor: &str, reason: &str) -> Fault {
    Fault::Tensor {
        tensor: tensor.into(),
        reason: reason.into(),
    }
}

/// Reads the tensors of a state dict as single precision.
///
/// # Errors
/// Where the file is damaged or holds anything but tensors by name.
pub fn read<R: Read + Seek>(mut file: R) -> Result<Tensors, Fault> {
    let size = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    let mut start = Vec::new();
    file.by_ref().take(2).read_to_end(&mut start)?;
    file.rewind()?;
    match &start[..] {
        b"PK" => read_zip(file, size),
        _ => read_legacy(file, size),
    }
}

/// The views of each storage, by the storage's name.
type Views = BTreeMap<String, (Storage, Vec<(String, View)>)>;

/// The tensors of a pickled state dict, none of which reaches out of its storage, and which all
/// together are no larger than `size` bytes of storages.
fn views(pickle: &Pickle, size: u64) -> Result<Views, Fault> {
    let Value::Dict(items) = pickle.root() else {
        return Err(not_a_state_dict());
    };
    let mut views = Views::new();
    let mut names = BTreeSet::new();
    for &(name, value) in items {
        let (Value::Text(name), Value::Tensor(view)) = (pickle.get(name), pickle.get(value)) else {
            return Err(not_a_state_dict());
        };
        if !names.insert(name) {
            return Err(wrong(name, "is there twice"));
        }
        check(view).ok_or_else(|| wrong(name, "reaches out of its storage"))?;
        let storage = &view.storage;
        let (first, of_storage) = views
            .entry(storage.key.clone())
            .or_insert_with(|| (storage.clone(), Vec::new()));
        if first != storage {
            return Err(wrong(name, "contradicts another tensor's storage"));
        }
        of_storage.push((name.clone(), view.clone()));
    }
    let mut room = size;
    for (storage, of_storage) in views.values() {
        let bytes = storage.len.checked_mul(storage.dtype.size() as u64);
        room = bytes
            .and_then(|bytes| room.checked_sub(bytes))
            .ok_or(Fault::Truncated)?;
        let mut elements = storage.len;
        for (name, view) in of_storage {
            let count = view.shape.iter().product();
            let left = elements.checked_sub(count);
            elements = left.ok_or_else(|| wrong(name, "shares its values with others"))?;
        }
    }
    Ok(views)
}

fn not_a_state_dict() -> Fault {
    Fault::Refused(
        "it holds other things than tensors by name: save the model's state_dict() alone".into(),
    )
}

/// Whether a view stays within its storage and has no more elements than that.
fn check(view: &View) -> Option<()> {
    let mut extents = view.shape.iter();
    let count = extents.try_fold(1u64, |n, &extent| n.checked_mul(extent))?;
    if view.shape.len() != view.strides.len() || count > view.storage.len {
        return None;
    }
    let mut last = view.offset;
    for (&extent, &stride) in view.shape.iter().zip(&view.strides) {
        last = last.checked_add(extent.saturating_sub(1).checked_mul(stride)?)?;
    }
    (count == 0 || last < view.storage.len).then_some(())
}

/// Reads a storage from `file` and adds its tensors.
fn add(
    tensors: &mut Tensors,
    file: &mut impl Read,
    storage: &Storage,
    views: Vec<(String, View)>,
) -> Result<(), Fault> {
    let values = match storage.dtype {
        Dtype::F32 => elements(file, storage.len, f32::from_le_bytes),
        Dtype::F64 => elements(file, storage.len, |b| f64::from_le_bytes(b) as f32),
        Dtype::F16 => elements(file, storage.len, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => elements(file, storage.len, |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::Other { .. } => {
            let name = views.first().map_or("", |(name, _)| name);
            return Err(wrong(name, "has no floating-point values"));
        }
    }?;
    let shape = |view: &View| view.shape.iter().map(|&extent| extent as usize).collect();
    if let [(name, view)] = &views[..]
        && is_whole(view)
    {
        let shape = shape(view);
        tensors.insert(name.clone(), Tensor { shape, values });
        return Ok(());
    }
    for (name, view) in views {
        let (shape, values) = (shape(&view), gather(&view, &values));
        tensors.insert(name, Tensor { shape, values });
    }
    Ok(())
}

fn elements<const N: usize>(
    file: &mut impl Read,
    count: u64,
    value: impl Fn([u8; N]) -> f32,
) -> Result<Vec<f32>, Fault> {
    let mut left = count as usize;
    let mut values = Vec::new();
    values.try_reserve_exact(left).map_err(io::Error::other)?;
    let mut buffer = [0; 1 << 14];
    while left > 0 {
        let bytes = &mut buffer[..(N * left).min(1 << 14)];
        file.read_exact(bytes)?;
        let (words, _) = bytes.as_chunks();
        values.extend(words.iter().map(|&word| value(word)));
        left -= words.len();
    }
    Ok(values)
}

/// Whether a view is all of its storage in its order.
fn is_whole(view: &View) -> bool {
    let mut count = 1;
    let mut axes = view.shape.iter().zip(&view.strides).rev();
    let contiguous = axes.all(|(&extent, &stride)| {
        let fits = extent <= 1 || stride == count;
        count *= extent;
        fits
    });
    contiguous && view.offset == 0 && count == view.storage.len
}

/// The elements of a view, which has been checked, in the order of its axes.
fn gather(view: &View, storage: &[f32]) -> Vec<f32> {
    let count = view.shape.iter().product::<u64>() as usize;
    let mut values = Vec::with_capacity(count);
    let mut index = vec![0; view.shape.len()];
    let mut at = view.offset;
    while values.len() < count {
        values.push(storage[at as usize]);
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            at += view.strides[axis];
            if index[axis] < view.shape[axis] {
                break;
            }
            at -= view.strides[axis] * view.shape[axis];
            index[axis] = 0;
        }
    }
    values
}

fn read_zip<R: Read + Seek>(mut file: R, size: u64) -> Result<Tensors, Fault> {
    check_entries(&mut file, size)?;
    file.rewind()?;
    let mut archive = ZipArchive::new(file).map_err(zip_fault)?;
    let pickle = archive.file_names().find_map(|name| {
        let root = name.strip_suffix("data.pkl")?;
        (root.ends_with('/') || root.is_empty()).then(|| root.to_owned())
    });
    let root = pickle.ok_or_else(|| {
        Fault::Refused("it is an archive without a PyTorch state dict (data.pkl)".into())
    })?;
    let pickle = {
        let mut entry = archive
            .by_name(&format!("{root}data.pkl"))
            .map_err(zip_fault)?;
        let pickle = Pickle::read(&mut entry)?;
        end(&mut entry)?;
        pickle
    };
    match archive.by_name(&format!("{root}byteorder")) {
        Ok(mut entry) => {
            let mut order = Vec::new();
            entry.by_ref().take(7).read_to_end(&mut order)?;
            end(&mut entry)?;
            if order != b"little" {
                return Err(Fault::Refused("it was written big-endian".into()));
            }
        }
        // Older than that entry.
        Err(ZipError::FileNotFound) => {}
        Err(error) => return Err(zip_fault(error)),
    }
    let mut tensors = Tensors::new();
    for (key, (storage, views)) in views(&pickle, size)? {
        let name = format!("{root}data/{key}");
        let mut entry = archive.by_name(&name).map_err(zip_fault)?;
        let bytes = storage.len * storage.dtype.size() as u64;
        if entry.size() != bytes {
            return Err(Fault::Damaged(format!(
                "{name:?} has {} bytes, its tensors {bytes}",
                entry.size()
            )));
        }
        add(&mut tensors, &mut entry, &storage, views)?;
        end(&mut entry)?;
    }
    Ok(tensors)
}

fn zip_fault(error: ZipError) -> Fault {
    match error {
        ZipError::Io(error) => error.into(),
        ZipError::FileNotFound => Fault::Damaged("an entry of the archive is missing".into()),
        ZipError::InvalidArchive(reason) => Fault::Damaged(reason.into()),
        ZipError::UnsupportedArchive(reason) => Fault::Refused(reason.into()),
    }
}

/// Reads to the end of an archive's entry, where its checksum is held against what was read.
fn end(entry: &mut impl Read) -> Result<(), Fault> {
    match entry.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(Fault::Damaged("an entry of the archive is too long".into())),
        Err(_) => Err(Fault::Damaged(
            "the checksum of an entry of the archive does not hold".into(),
        )),
    }
}

/// Checks the number of entries of an archive, for which the reader takes memory unseen. PyTorch
/// writes the 64-bit form, at whose end there is a record, its locator and the older record.
fn check_entries(file: &mut (impl Read + Seek), size: u64) -> Result<(), Fault> {
    let not_pytorch = || Fault::Damaged("its archive does not end as PyTorch's do".into());
    let mut end = [0; 42];
    file.seek(SeekFrom::Start(
        size.checked_sub(42).ok_or(Fault::Truncated)?,
    ))?;
    file.read_exact(&mut end)?;
    if end[20..24] != *b"PK\x05\x06" {
        return Err(not_pytorch());
    }
    if end[..4] == *b"PK\x06\x07" {
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        file.seek(SeekFrom::Start(number(&end[8..16])))?;
        let mut record = [0; 40];
        file.read_exact(&mut record)?;
        if record[..4] != *b"PK\x06\x06" || number(&record[32..40]) > MAX_ENTRIES {
            return Err(not_pytorch());
        }
    }
    Ok(())
}

fn read_legacy(mut file: impl Read, size: u64) -> Result<Tensors, Fault> {
    let no_state_dict = || Fault::Refused("it is no PyTorch state dict".into());
    if *Pickle::read(&mut file)?.root() != Value::Plain(Some(MAGIC)) {
        return Err(no_state_dict());
    }
    if *Pickle::read(&mut file)?.root() != Value::Plain(Some(1001)) {
        return Err(no_state_dict());
    }
    let system = Pickle::read(&mut file)?;
    if let Value::Dict(items) = system.root() {
        for &(key, value) in items {
            let is_order = *system.get(key) == Value::Text("little_endian".into());
            if is_order && *system.get(value) != Value::Plain(Some(1)) {
                return Err(Fault::Refused("it was written big-endian".into()));
            }
        }
    }
    let mut views = views(&Pickle::read(&mut file)?, size)?;
    let keys = Pickle::read(&mut file)?;
    let Value::Sequence(ids) = keys.root() else {
        return Err(no_state_dict());
    };
    let mut tensors = Tensors::new();
    for &id in ids {
        let Value::Text(key) = keys.get(id) else {
            return Err(no_state_dict());
        };
        let (storage, views) = views.remove(key).ok_or_else(|| {
            Fault::Damaged("it has a storage of which no tensor is a part".into())
        })?;
        let mut len = [0; 8];
        file.read_exact(&mut len)?;
        if u64::from_le_bytes(len) != storage.len {
            return Err(Fault::Damaged(format!(
                "storage {key:?} has another length"
            )));
        }
        add(&mut tensors, &mut file, &storage, views)?;
    }
    if let Some((_, (_, views))) = views.into_iter().next() {
        let name = views.first().map_or("", |(name, _)| name);
        return Err(wrong(name, "has no storage"));
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn view(offset: u64, shape: Vec<u64>, strides: Vec<u64>, len: u64) -> View {
        let storage = Storage {
            key: "0".into(),
            dtype: Dtype::F32,
            len,
        };
        View {
            storage,
            offset,
            shape,
            strides,
        }
    }

    proptest! {
        /// A checked view is gathered as its definition says; what is not would leave its storage.
        #[test]
        fn views_stay_within_their_storage(
            axes in proptest::collection::vec((0u64..5, 0u64..30), 0..4),
            offset in 0u64..40,
            len in 0u64..200,
        ) {
            let (shape, strides): (Vec<u64>, Vec<u64>) = axes.iter().copied().unzip();
            let view = view(offset, shape.clone(), strides, len);
            let mut indices = vec![offset];
            for (extent, stride) in axes {
                let from = indices.iter();
                let steps = from.flat_map(|at| (0..extent).map(move |n| at + n * stride));
                indices = steps.collect();
            }
            let within = indices.iter().all(|&at| at < len) && indices.len() as u64 <= len;
            prop_assert_eq!(check(&view).is_some(), within);
            if within {
                let storage: Vec<f32> = (0..len).map(|n| n as f32).collect();
                let expected: Vec<f32> = indices.iter().map(|&at| at as f32).collect();
                if is_whole(&view) {
                    prop_assert_eq!(&expected, &storage);
                }
                prop_assert_eq!(gather(&view, &storage), expected);
            }
        }
    }

    #[test]
    fn views_that_cannot_be_counted_are_refused() {
        let max = u64::MAX;
        for (shape, strides) in [
            (vec![max, max], vec![0, 0]),
            (vec![max], vec![0]),
            (vec![2], vec![max]),
            (vec![2, 2], vec![max / 2, max / 2 + 1]),
            (vec![3], vec![max / 2]),
            (vec![2], vec![]),
        ] {
            assert_eq!(check(&view(1, shape, strides, 100)), None);
        }
        assert_eq!(check(&view(max, vec![], vec![], 100)), None);
    }
}
