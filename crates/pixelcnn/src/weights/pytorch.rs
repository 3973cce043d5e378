//! State dicts as `torch.save` writes them, alone or among other things: a zip archive with a pickle
//! and a file for each storage, or, before PyTorch 1.6, several pickles with the storages behind
//! them.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::mem::replace;

use zip::ZipArchive;
use zip::result::ZipError;

use super::pickle::{Id, Pickle, Storage, Value, View};
use super::{Fault, Tensor, Tensors, port};

/// Begins a file of the older form, as a pickled number.
const MAGIC: i64 = 0x1950_a86a_20f9_469c_fc6c_u128 as i64;

/// The most entries of an archive: several times those of the largest model.
const MAX_ENTRIES: u64 = 1 << 17;

/// How deep in lists and dicts a state dict may lie.
const MAX_DEPTH: usize = 8;

/// The most state dicts of models in a file: weights and averages, under two names each.
const MAX_DICTS: usize = 4;

/// The most tensors of a state dict: several times those of the largest model.
const MAX_TENSORS: usize = 1 << 15;

/// The most things to be named that are left out.
const MAX_UNUSED: usize = 1000;

fn wrong(tensor: &str, reason: &str) -> Fault {
    Fault::Tensor {
        tensor: tensor.into(),
        reason: reason.into(),
    }
}

/// Reads the weights of a PixelCNN++ from a state dict, or from whatever else there is with state
/// dicts in it (an epoch, an optimizer, a model's settings), under the names of its layers alone and
/// in single precision. Averages are there too, under `NAME/ExponentialMovingAverage`, where there
/// are both: [`super::read`] says which is which. Of a file without a PixelCNN++ that is known come
/// the tensors of the outermost state dict, whatever their names. What is left out is added to
/// `unused`.
///
/// # Errors
/// Where the file is damaged, has no tensors by name, or several models.
pub fn read<R: Read + Seek>(mut file: R, unused: &mut Vec<String>) -> Result<Tensors, Fault> {
    let size = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    let mut start = Vec::new();
    file.by_ref().take(2).read_to_end(&mut start)?;
    file.rewind()?;
    match &start[..] {
        b"PK" => read_zip(file, size, unused),
        _ => read_legacy(file, size, unused),
    }
}

/// A container in a pickle.
struct Place {
    id: Id,
    /// The place that it is in.
    within: usize,
    depth: usize,
}

/// The containers that the pickle's value is made of, the outer before the inner.
fn places(pickle: &Pickle) -> Vec<Place> {
    let mut seen = vec![false; pickle.len()];
    seen[pickle.root()] = true;
    let mut places = vec![Place {
        id: pickle.root(),
        within: 0,
        depth: 0,
    }];
    let mut next = 0;
    while let Some(&Place { id, depth, .. }) = places.get(next) {
        let mut add = |id: Id| {
            let is_container = matches!(pickle.get(id), Value::Sequence(_) | Value::Dict(_));
            if is_container && depth < MAX_DEPTH && !replace(&mut seen[id], true) {
                places.push(Place {
                    id,
                    within: next,
                    depth: depth + 1,
                });
            }
        };
        match pickle.get(id) {
            Value::Sequence(items) => items.iter().for_each(|&item| add(item)),
            Value::Dict(items) => items.iter().for_each(|&(_, value)| add(value)),
            _ => {}
        }
        next += 1;
    }
    places
}

/// The items of a container by name: those of a sequence are numbered.
fn items(pickle: &Pickle, id: Id) -> impl Iterator<Item = (Cow<'_, str>, Id)> {
    let (listed, keyed) = match pickle.get(id) {
        Value::Sequence(items) => (&items[..], &[][..]),
        Value::Dict(items) => (&[][..], &items[..]),
        _ => (&[][..], &[][..]),
    };
    let listed = listed.iter().enumerate();
    let listed = listed.map(|(n, &id)| (n.to_string().into(), id));
    let keyed = keyed.iter().map(|&(key, id)| match pickle.get(key) {
        Value::Text(name) => (name.into(), id),
        Value::Plain(Some(number)) => (number.to_string().into(), id),
        _ => ("?".into(), id),
    });
    listed.chain(keyed)
}

/// The places from the outermost to one of them.
fn way(places: &[Place], to: usize) -> Vec<usize> {
    let mut way = vec![to];
    while let Some(&at) = way.last()
        && at > 0
    {
        way.push(places[at].within);
    }
    way.reverse();
    way
}

/// The names on the way to a place, each with a dot behind it.
fn path(pickle: &Pickle, places: &[Place], to: usize) -> String {
    let steps = way(places, to);
    let steps = steps.windows(2).map(|step| {
        let mut items = items(pickle, places[step[0]].id);
        let item = items.find(|&(_, id)| id == places[step[1]].id);
        item.map_or_else(String::new, |(name, _)| format!("{name}."))
    });
    steps.collect()
}

/// The tensors of a pickle that are the weights and averages of a model; what is left out on the
/// way to them is added to `unused`.
fn chosen(pickle: &Pickle, unused: &mut Vec<String>) -> Result<BTreeMap<String, View>, Fault> {
    let places = places(pickle);
    let tensors = |place: usize| {
        let Place { id, .. } = places[place];
        let is_dict = matches!(pickle.get(id), Value::Dict(_));
        items(pickle, id).filter(move |&(_, id)| is_dict && pickle.is_tensor(id))
    };
    let mut models: Vec<usize> = (0..places.len())
        .filter(|&place| tensors(place).any(|(name, _)| port::is_first(&name)))
        .take(MAX_DICTS + 1)
        .collect();
    let is_model = !models.is_empty();
    if !is_model {
        let first = (0..places.len()).find(|&place| tensors(place).next().is_some());
        models.push(first.ok_or_else(|| no_state_dict(pickle))?);
    }
    if models.len() > MAX_DICTS
        || models
            .iter()
            .any(|&m| tensors(m).nth(MAX_TENSORS).is_some())
    {
        return Err(Fault::Refused(
            "it has more weights than one PixelCNN++: save the model's state_dict() alone".into(),
        ));
    }
    let dicts = models.iter().map(|&model| {
        let views = tensors(model).map(|(name, id)| (name.into_owned(), pickle.view(id)));
        (path(pickle, &places, model), views.collect())
    });
    let views = match is_model {
        true => port::choose(dicts.collect())?,
        false => {
            let tensors = dicts.flat_map(|(_, tensors): (_, Vec<_>)| tensors);
            port::by_name(tensors.map(|(name, view)| (name.clone(), (name, view))))?
        }
    };
    let on_the_way: BTreeSet<usize> = models.iter().flat_map(|&m| way(&places, m)).collect();
    for &place in &on_the_way {
        let within = path(pickle, &places, place);
        let other = items(pickle, places[place].id).filter(|&(_, id)| {
            let is_weight = models.contains(&place) && pickle.is_tensor(id);
            !is_weight && on_the_way.iter().all(|&used| places[used].id != id)
        });
        let room = MAX_UNUSED.saturating_sub(unused.len());
        unused.extend(other.take(room).map(|(name, _)| format!("{within}{name}")));
    }
    let known = views.into_iter().map(|(key, (name, view))| match view {
        Some(view) => Ok((key, view)),
        None => Err(wrong(&name, "is of a kind that is not read here")),
    });
    known.collect()
}

fn no_state_dict(pickle: &Pickle) -> Fault {
    let what = match pickle.foreign() {
        Some(name) => format!("its pickle asks for {name:?}, which no state dict needs"),
        None => "it holds no tensors by name".into(),
    };
    Fault::Refused(format!("{what}: save the model's state_dict() alone"))
}

/// The views of each storage, by the storage's name.
type Views = BTreeMap<String, (Storage, Vec<(String, View)>)>;

/// The chosen tensors, none of which reaches out of its storage, and which all together are no
/// larger than `size` bytes of storages.
fn views(pickle: &Pickle, size: u64, unused: &mut Vec<String>) -> Result<Views, Fault> {
    let mut views = Views::new();
    for (name, view) in chosen(pickle, unused)? {
        check(&view).ok_or_else(|| wrong(&name, "reaches out of its storage"))?;
        let storage = &view.storage;
        let (first, of_storage) = views
            .entry(storage.key.clone())
            .or_insert_with(|| (storage.clone(), Vec::new()));
        if first != storage {
            return Err(wrong(&name, "contradicts another tensor's storage"));
        }
        of_storage.push((name, view));
    }
    let mut room = size;
    for (storage, of_storage) in views.values() {
        let bytes = storage.len.checked_mul(storage.dtype.size as u64);
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
    let Some(float) = storage.dtype.float else {
        let name = views.first().map_or("", |(name, _)| name);
        return Err(wrong(name, "has no floating-point values"));
    };
    let values = float.read(file, storage.len as usize)?;
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

fn read_zip<R: Read + Seek>(
    mut file: R,
    size: u64,
    unused: &mut Vec<String>,
) -> Result<Tensors, Fault> {
    check_entries(&mut file, size)?;
    file.rewind()?;
    let mut archive = ZipArchive::new(file).map_err(zip_fault)?;
    let pickle = archive.file_names().find_map(|name| {
        let name = name.ok()?;
        let root = name.strip_suffix("data.pkl")?;
        (root.ends_with('/') || root.is_empty()).then(|| root.to_owned())
    });
    let root = pickle.ok_or_else(|| {
        Fault::Refused("it is an archive without a PyTorch state dict (data.pkl)".into())
    })?;
    let pickle = {
        let entry = archive
            .by_name(&format!("{root}data.pkl"))
            .map_err(zip_fault)?;
        let mut entry = BufReader::new(entry);
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
    for (key, (storage, views)) in views(&pickle, size, unused)? {
        let name = format!("{root}data/{key}");
        let mut entry = archive.by_name(&name).map_err(zip_fault)?;
        let bytes = storage.len * storage.dtype.size as u64;
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
        error => Fault::Refused(error.to_string()),
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

fn read_legacy(mut file: impl Read, size: u64, unused: &mut Vec<String>) -> Result<Tensors, Fault> {
    let not_pytorch = || Fault::Refused("it is no PyTorch state dict".into());
    let mut is_next = |number| {
        let pickle = Pickle::read(&mut file)?;
        let is = *pickle.get(pickle.root()) == Value::Plain(Some(number));
        is.then_some(()).ok_or_else(not_pytorch)
    };
    is_next(MAGIC)?;
    is_next(1001)?;
    let system = Pickle::read(&mut file)?;
    let order = items(&system, system.root()).find(|(name, _)| name == "little_endian");
    if order.is_some_and(|(_, order)| *system.get(order) != Value::Plain(Some(1))) {
        return Err(Fault::Refused("it was written big-endian".into()));
    }
    let dict = Pickle::read(&mut file)?;
    let keys = Pickle::read(&mut file)?;
    let mut views = views(&dict, size, unused)?;
    let all = dict
        .storages()
        .map(|storage| (storage.key.clone(), storage));
    let all: BTreeMap<String, Storage> = all.collect();
    let mut tensors = Tensors::new();
    for &id in keys.sequence(keys.root()).ok_or_else(not_pytorch)? {
        let key = keys.text(id).ok_or_else(not_pytorch)?;
        let of_model = views.remove(key);
        let storage = of_model.as_ref().map(|(storage, _)| storage);
        let storage = storage.or_else(|| all.get(key)).ok_or_else(|| {
            Fault::Damaged(format!("it doesn't say what its storage {key:?} is of"))
        })?;
        let mut len = [0; 8];
        file.read_exact(&mut len)?;
        if u64::from_le_bytes(len) != storage.len {
            return Err(Fault::Damaged(format!(
                "storage {key:?} has another length"
            )));
        }
        match of_model {
            Some((storage, views)) => add(&mut tensors, &mut file, &storage, views)?,
            // Of an optimizer, say.
            None => {
                let bytes = storage.len.saturating_mul(storage.dtype.size as u64);
                if io::copy(&mut file.by_ref().take(bytes), &mut io::sink())? < bytes {
                    return Err(Fault::Truncated);
                }
            }
        }
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

    use super::super::Float;
    use super::super::pickle::Dtype;
    use super::*;

    fn view(offset: u64, shape: Vec<u64>, strides: Vec<u64>, len: u64) -> View {
        let storage = Storage {
            key: "0".into(),
            dtype: Dtype {
                float: Some(Float::F32),
                size: 4,
            },
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
