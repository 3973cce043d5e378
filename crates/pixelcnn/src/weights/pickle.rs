//! The part of Python's pickles that PyTorch's checkpoints need: a stack machine that makes plain
//! values and calls nothing. What Python would call stays a note of the callee and its arguments,
//! which [`Pickle::view`] understands where it makes a tensor, and which is passed over elsewhere.

use std::collections::HashMap;
use std::io::{self, Read, Take};

use super::{Fault, Float};

/// The longest pickle that is read: with pictures in it, say, beside the state dicts.
const MAX_PICKLE: u64 = 64 << 20;

/// The most values of a pickle, taken from the memo again included: hundreds of times those of the
/// largest model's state dict.
const MAX_VALUES: usize = 4 << 20;

/// The longest text that is kept: several times the longest name of a layer.
const MAX_TEXT: u64 = 300;

/// The most axes of a tensor.
const MAX_RANK: usize = 8;

/// The most calls that a tensor goes through: of a parameter's subclass two.
const MAX_CALLS: usize = 4;

/// Type of a storage's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dtype {
    /// Floating-point numbers; none for whole ones and others, which no parameter has.
    pub float: Option<Float>,
    /// Bytes of an element.
    pub size: usize,
}

impl Dtype {
    /// That of the elements of `torch.FloatStorage` and its like.
    fn named(storage: &str) -> Option<Dtype> {
        let float = |float: Float| Dtype {
            float: Some(float),
            size: float.size(),
        };
        let other = |size| Dtype { float: None, size };
        Some(
            match storage.strip_prefix("torch.")?.strip_suffix("Storage")? {
                "Float" => float(Float::F32),
                "Double" => float(Float::F64),
                "Half" => float(Float::F16),
                "BFloat16" => float(Float::BF16),
                "ComplexDouble" => other(16),
                "Long" | "ComplexFloat" => other(8),
                "Int" | "QInt32" => other(4),
                "Short" => other(2),
                "Char" | "Byte" | "Bool" | "storage.Untyped" | "QInt8" | "QUInt8" => other(1),
                _ => return None,
            },
        )
    }
}

/// A run of elements that tensors are views of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Its name in the file.
    pub key: String,
    /// Its elements.
    pub dtype: Dtype,
    /// Their number.
    pub len: u64,
}

/// A tensor as a view of a storage, in elements; whether it stays in there is not checked yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The storage.
    pub storage: Storage,
    /// Its first element.
    pub offset: u64,
    /// Extents.
    pub shape: Vec<u64>,
    /// Steps along each axis.
    pub strides: Vec<u64>,
}

/// Index of a value: values are never inside each other, so that none is deep.
pub type Id = usize;

/// A value of a pickle.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A number, truth value, none, or bytes and texts that are no name: nothing that is looked at,
    /// but for whole numbers.
    Plain(Option<i64>),
    /// A text.
    Text(String),
    /// A tuple, list or set.
    Sequence(Vec<Id>),
    /// A dict of any kind.
    Dict(Vec<(Id, Id)>),
    /// Something of a module of Python's, by name.
    Global(String),
    /// What calling the first with the sequence of arguments would make.
    Call(Id, Id),
    /// What stands for something outside of the pickle: a storage.
    Persistent(Id),
}

/// All that is only passed over shares one value.
const NOTHING: Id = 0;

/// What a pickle holds.
#[derive(Debug)]
pub struct Pickle {
    values: Vec<Value>,
    root: Id,
}

impl Pickle {
    /// Reads one pickle and nothing behind it.
    ///
    /// # Errors
    /// Where it is damaged, too long or has operations that PyTorch doesn't use.
    pub fn read(file: &mut impl Read) -> Result<Pickle, Fault> {
        let mut machine = Machine {
            bytes: file.take(MAX_PICKLE),
            room: MAX_VALUES,
            values: vec![Value::Plain(None)],
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        loop {
            let op = machine.array::<1>()?[0];
            if op == b'.' {
                let root = machine.pop()?;
                let values = machine.values;
                return Ok(Pickle { values, root });
            }
            machine.step(op)?;
        }
    }

    /// The value that was pickled.
    pub fn root(&self) -> Id {
        self.root
    }

    /// One of the values.
    pub fn get(&self, id: Id) -> &Value {
        &self.values[id]
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// A text.
    pub fn text(&self, id: Id) -> Option<&str> {
        match &self.values[id] {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The items of a tuple or list.
    pub fn sequence(&self, id: Id) -> Option<&[Id]> {
        match &self.values[id] {
            Value::Sequence(items) => Some(items),
            _ => None,
        }
    }

    /// The first thing that is named and that no state dict needs.
    pub fn foreign(&self) -> Option<&str> {
        self.values.iter().find_map(|value| match value {
            Value::Global(name)
                if name != ORDERED_DICT && !is_rebuilt(name) && Dtype::named(name).is_none() =>
            {
                Some(name.as_str())
            }
            _ => None,
        })
    }

    /// Whether a value is a tensor or parameter of any kind.
    pub fn is_tensor(&self, id: Id) -> bool {
        self.call(id).is_some_and(|(callee, _)| is_rebuilt(callee))
    }

    /// A tensor or parameter; none where it is of a kind that is not known here, or makes no sense.
    pub fn view(&self, id: Id) -> Option<View> {
        let (mut callee, mut arguments) = self.call(id)?;
        for _ in 0..MAX_CALLS {
            (callee, arguments) = match (callee.rsplit('.').next()?, arguments) {
                ("_rebuild_parameter" | "_rebuild_parameter_with_state", &[tensor, ..]) => {
                    self.call(tensor)?
                }
                ("_rebuild_from_type" | "_rebuild_from_type_v2", &[callee, _, arguments, ..]) => {
                    (self.global(callee)?, self.sequence(arguments)?)
                }
                (
                    "_rebuild_tensor" | "_rebuild_tensor_v2",
                    &[storage, offset, shape, strides, ..],
                ) => {
                    return Some(View {
                        storage: self.storage(storage)?,
                        offset: self.number(offset)?,
                        shape: self.numbers(shape)?,
                        strides: self.numbers(strides)?,
                    });
                }
                _ => return None,
            };
        }
        None
    }

    /// All storages, those of no tensor among them.
    pub fn storages(&self) -> impl Iterator<Item = Storage> {
        (0..self.values.len()).filter_map(|id| self.storage(id))
    }

    /// `('storage', type, key, location, number of elements)`; the older form adds of what larger
    /// storage it is a view, which has not been for long.
    fn storage(&self, id: Id) -> Option<Storage> {
        let Value::Persistent(id) = self.values[id] else {
            return None;
        };
        let (&[kind, dtype, key, _, len], view) = self.sequence(id)?.split_first_chunk()?;
        let alone = view.iter().all(|&view| view == NOTHING);
        (self.text(kind)? == "storage" && alone).then_some(())?;
        Some(Storage {
            key: self.text(key)?.to_owned(),
            dtype: Dtype::named(self.global(dtype)?)?,
            len: self.number(len)?,
        })
    }

    fn call(&self, id: Id) -> Option<(&str, &[Id])> {
        match self.values[id] {
            Value::Call(callee, arguments) => {
                Some((self.global(callee)?, self.sequence(arguments)?))
            }
            _ => None,
        }
    }

    fn global(&self, id: Id) -> Option<&str> {
        match &self.values[id] {
            Value::Global(name) => Some(name),
            _ => None,
        }
    }

    fn number(&self, id: Id) -> Option<u64> {
        match self.values[id] {
            Value::Plain(number) => number?.try_into().ok(),
            _ => None,
        }
    }

    /// A short tuple of numbers; PyTorch's first versions call a type for it.
    fn numbers(&self, id: Id) -> Option<Vec<u64>> {
        let numbers = match self.call(id) {
            Some(("torch.Size", &[numbers])) => numbers,
            _ => id,
        };
        let numbers = self.sequence(numbers)?;
        (numbers.len() <= MAX_RANK).then_some(())?;
        numbers.iter().map(|&id| self.number(id)).collect()
    }
}

const ORDERED_DICT: &str = "collections.OrderedDict";

/// Whether what a function of this name makes is a tensor.
fn is_rebuilt(callee: &str) -> bool {
    callee.starts_with("torch._utils._rebuild_") || callee.starts_with("torch._tensor._rebuild_")
}

fn broken() -> Fault {
    Fault::Damaged("its pickle makes no sense".into())
}

struct Machine<R> {
    bytes: Take<R>,
    /// Values that may come yet: each takes some bytes of memory, whatever it is of the file.
    room: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Lengths of the stack where the values of a list or dict begin.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<R: Read> Machine<R> {
    fn step(&mut self, op: u8) -> Result<(), Fault> {
        match op {
            // Protocol and framing.
            0x80 => drop(self.array::<1>()?),
            0x95 => drop(self.array::<8>()?),
            // Plain values.
            b'N' => self.push_id(NOTHING)?,
            0x88 | 0x89 => self.push(Value::Plain(Some((op == 0x88).into())))?,
            b'J' => self.int(|machine| Ok(i32::from_le_bytes(machine.array()?).into()))?,
            b'K' => self.int(|machine| Ok(u8::from_le_bytes(machine.array()?).into()))?,
            b'M' => self.int(|machine| Ok(u16::from_le_bytes(machine.array()?).into()))?,
            0x8a => self.long()?,
            b'G' => self.skip(8)?,
            // Texts, with a length of one, four or eight bytes; Python 2's are bytes.
            0x8c | b'U' => {
                let length = self.array::<1>()?[0];
                self.text(length.into())?;
            }
            b'X' | b'T' => {
                let length = u32::from_le_bytes(self.array()?);
                self.text(length.into())?;
            }
            0x8d => {
                let length = u64::from_le_bytes(self.array()?);
                self.text(length)?;
            }
            // Bytes and very long numbers.
            b'C' => {
                let length = self.array::<1>()?[0];
                self.skip(length.into())?;
            }
            b'B' | 0x8b => {
                let length = u32::from_le_bytes(self.array()?);
                self.skip(length.into())?;
            }
            0x8e | 0x96 => {
                let length = u64::from_le_bytes(self.array()?);
                self.skip(length)?;
            }
            // Tuples, lists, sets, dicts.
            b'(' => self.mark()?,
            b')' | b']' | 0x8f => self.push(Value::Sequence(Vec::new()))?,
            b'}' => self.push(Value::Dict(Vec::new()))?,
            b't' | 0x91 => {
                let items = self.pop_mark()?;
                self.push(Value::Sequence(items))?;
            }
            0x85..=0x87 => {
                let from = self.top(op - 0x84)?;
                let items = self.stack.split_off(from);
                self.push(Value::Sequence(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_mark()?;
                self.extend(items)?;
            }
            b's' => {
                let from = self.top(2)?;
                let items = self.stack.split_off(from);
                self.update(&items)?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.update(&items)?;
            }
            // The stack and the memo.
            b'0' if self.marks.last() == Some(&self.stack.len()) => drop(self.pop_mark()?),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let last = self.last()?;
                self.push_id(last)?;
            }
            b'q' => {
                let at = self.array::<1>()?[0];
                self.memorize(at.into())?;
            }
            b'r' => {
                let at = u32::from_le_bytes(self.array()?);
                self.memorize(at)?;
            }
            0x94 => self.memorize(self.memo.len() as u32)?,
            b'h' => {
                let at = self.array::<1>()?[0];
                self.recall(at.into())?;
            }
            b'j' => {
                let at = u32::from_le_bytes(self.array()?);
                self.recall(at)?;
            }
            // What is made by calls in Python.
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global(format!("{module}.{name}")))?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) =
                    (&self.values[module], &self.values[name])
                else {
                    return Err(broken());
                };
                let name = format!("{module}.{name}");
                self.push(Value::Global(name))?;
            }
            b'R' | 0x81 => {
                let (arguments, callee) = (self.pop()?, self.pop()?);
                self.call(callee, arguments)?;
            }
            // With named arguments.
            0x92 => {
                self.pop()?;
                let (arguments, callee) = (self.pop()?, self.pop()?);
                self.call(callee, arguments)?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Persistent(id))?;
            }
            // Attributes: a state dict has its modules' versions there, a module its parameters.
            b'b' => {
                self.pop()?;
                let to = self.last()?;
                if !matches!(
                    self.values[to],
                    Value::Dict(_) | Value::Sequence(_) | Value::Call(..)
                ) {
                    return Err(broken());
                }
            }
            other => {
                return Err(Fault::Refused(format!(
                    "its pickle has the operation {other:#04x}, which no state dict needs: \
                     save the model's state_dict() alone"
                )));
            }
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        match self.bytes.read_exact(&mut bytes) {
            Err(_) if self.bytes.limit() < N as u64 => Err(too_long()),
            read => Ok(read.map(|()| bytes)?),
        }
    }

    /// Passes bytes over, which stand for something that is not looked at.
    fn skip(&mut self, length: u64) -> Result<(), Fault> {
        let limit = self.bytes.limit();
        let skipped = io::copy(&mut self.bytes.by_ref().take(length), &mut io::sink())?;
        short(skipped, length, limit)?;
        self.push_id(NOTHING)
    }

    fn take_room(&mut self) -> Result<(), Fault> {
        self.room = self.room.checked_sub(1).ok_or_else(too_long)?;
        Ok(())
    }

    fn push(&mut self, value: Value) -> Result<(), Fault> {
        self.values.push(value);
        self.push_id(self.values.len() - 1)
    }

    fn push_id(&mut self, id: Id) -> Result<(), Fault> {
        self.take_room()?;
        self.stack.push(id);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, Fault> {
        // Nothing is taken from before a mark.
        match self.stack.len() > self.marks.last().copied().unwrap_or(0) {
            true => self.stack.pop().ok_or_else(broken),
            false => Err(broken()),
        }
    }

    fn last(&self) -> Result<Id, Fault> {
        self.stack.last().copied().ok_or_else(broken)
    }

    /// Where the uppermost `count` values of the stack begin.
    fn top(&self, count: u8) -> Result<usize, Fault> {
        let from = self.stack.len().checked_sub(count.into());
        let floor = self.marks.last().copied().unwrap_or(0);
        from.filter(|&from| from >= floor).ok_or_else(broken)
    }

    fn mark(&mut self) -> Result<(), Fault> {
        self.take_room()?;
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>, Fault> {
        let mark = self.marks.pop().ok_or_else(broken)?;
        Ok(self.stack.split_off(mark))
    }

    fn extend(&mut self, items: Vec<Id>) -> Result<(), Fault> {
        let list = self.last()?;
        match &mut self.values[list] {
            Value::Sequence(list) => list.extend(items),
            // Of a subclass.
            list @ Value::Call(..) => *list = Value::Sequence(items),
            _ => return Err(broken()),
        }
        Ok(())
    }

    fn update(&mut self, items: &[Id]) -> Result<(), Fault> {
        let dict = self.last()?;
        let (pairs, []) = items.as_chunks() else {
            return Err(broken());
        };
        let pairs = pairs.iter().map(|&[key, value]| (key, value));
        match &mut self.values[dict] {
            Value::Dict(dict) => dict.extend(pairs),
            // Of a subclass, such as OrderedDict.
            dict @ Value::Call(..) => *dict = Value::Dict(pairs.collect()),
            _ => return Err(broken()),
        }
        Ok(())
    }

    fn memorize(&mut self, at: u32) -> Result<(), Fault> {
        self.take_room()?;
        let value = self.last()?;
        self.memo.insert(at, value);
        Ok(())
    }

    fn recall(&mut self, at: u32) -> Result<(), Fault> {
        let value = *self.memo.get(&at).ok_or_else(broken)?;
        self.push_id(value)
    }

    fn int(&mut self, read: impl Fn(&mut Self) -> Result<i64, Fault>) -> Result<(), Fault> {
        let value = read(self)?;
        self.push(Value::Plain(Some(value)))
    }

    /// A whole number of any length: longer ones than 8 bytes only serve as a magic number.
    fn long(&mut self) -> Result<(), Fault> {
        let length = self.array::<1>()?[0];
        let mut value = 0i64;
        for i in 0..length {
            let byte = i64::from(self.array::<1>()?[0]);
            if i < 8 {
                value |= byte << (8 * i);
            }
        }
        if (1..8).contains(&length) {
            let unused = 64 - 8 * u32::from(length);
            value = value << unused >> unused;
        }
        self.push(Value::Plain(Some(value)))
    }

    fn text(&mut self, length: u64) -> Result<(), Fault> {
        if length > MAX_TEXT {
            return self.skip(length);
        }
        let mut text = Vec::new();
        let limit = self.bytes.limit();
        self.bytes.by_ref().take(length).read_to_end(&mut text)?;
        short(text.len() as u64, length, limit)?;
        match String::from_utf8(text) {
            Ok(text) => self.push(Value::Text(text)),
            // Bytes, of Python 2.
            Err(_) => self.push_id(NOTHING),
        }
    }

    fn line(&mut self) -> Result<String, Fault> {
        let mut line = Vec::new();
        while line.len() as u64 <= MAX_TEXT {
            match self.array::<1>()?[0] {
                b'\n' => return String::from_utf8(line).map_err(|_| broken()),
                byte => line.push(byte),
            }
        }
        Err(broken())
    }

    /// Notes a call down. An `OrderedDict` of Python 2 has its items among the arguments.
    fn call(&mut self, callee: Id, arguments: Id) -> Result<(), Fault> {
        let (name, Value::Sequence(list)) = (&self.values[callee], &self.values[arguments]) else {
            return Err(broken());
        };
        let value = match (name, &list[..]) {
            (Value::Global(name), &[items]) if name == ORDERED_DICT => {
                // Moved, lest a short pickle make many copies.
                let moved = std::mem::replace(&mut self.values[items], Value::Plain(None));
                let Value::Sequence(pairs) = moved else {
                    return Err(broken());
                };
                let pair = |&pair: &Id| match &self.values[pair] {
                    Value::Sequence(pair) => <[Id; 2]>::try_from(&pair[..]).ok(),
                    _ => None,
                };
                let pairs = pairs.iter().map(|id| Some(pair(id)?.into()));
                Value::Dict(pairs.collect::<Option<_>>().ok_or_else(broken)?)
            }
            (Value::Global(_) | Value::Call(..), _) => Value::Call(callee, arguments),
            _ => return Err(broken()),
        };
        self.push(value)
    }
}

/// Why fewer bytes were found than should be there, `limit` of which may still have been read.
fn short(found: u64, length: u64, limit: u64) -> Result<(), Fault> {
    match found == length {
        true => Ok(()),
        false if found == limit => Err(too_long()),
        false => Err(Fault::Truncated),
    }
}

fn too_long() -> Fault {
    Fault::Refused("its pickle is longer than the largest PixelCNN++'s".into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Result<Pickle, Fault> {
        Pickle::read(&mut &bytes[..])
    }

    #[test]
    fn nothing_is_run() {
        for (pickle, name) in [
            (
                &b"cposix\nsystem\n(X\x02\x00\x00\x00lstR."[..],
                "posix.system",
            ),
            (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "posix.system"),
            (b"cbuiltins\neval\nNNN\x87R.", "builtins.eval"),
            (
                b"ctorch.serialization\nload\n)\x81}b.",
                "torch.serialization.load",
            ),
            (b"c__builtin__\ngetattr\n)}\x92.", "__builtin__.getattr"),
        ] {
            let pickle = read(pickle).unwrap();
            assert_eq!(pickle.foreign(), Some(name));
            assert!(!pickle.is_tensor(pickle.root()), "{name}");
            assert_eq!(pickle.view(pickle.root()), None);
        }
        for (pickle, part) in [
            (&b"ios\nsystem\n."[..], "the operation 0x69"),
            (b"\x82\x01.", "the operation 0x82"),
            (b"P1\n.", "the operation 0x50"),
        ] {
            let error = read(pickle).unwrap_err();
            assert!(matches!(error, Fault::Refused(_)), "{error}");
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn numbers_and_containers() {
        let plain = |pickle: &[u8]| {
            let pickle = read(pickle).unwrap();
            match pickle.get(pickle.root()) {
                Value::Plain(number) => *number,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(plain(b"K\xff."), Some(255));
        assert_eq!(plain(b"M\x01\x02."), Some(513));
        assert_eq!(plain(b"J\xfe\xff\xff\xff."), Some(-2));
        assert_eq!(plain(b"\x8a\x01\xfe."), Some(-2));
        assert_eq!(plain(b"\x8a\x03\x00\x00\x01."), Some(65536));
        assert_eq!(plain(b"\x8a\x00."), Some(0));
        assert_eq!(plain(b"N."), None);
        assert_eq!(plain(b"G\x40\x04\0\0\0\0\0\0."), None);
        assert_eq!(plain(b"K\x01(K\x02K\x031."), Some(1));
        assert_eq!(plain(b"K\x01K\x020."), Some(1));
        assert_eq!(plain(b"K\x01(0."), Some(1));
        assert_eq!(plain(b"K\x012."), Some(1));
        let dict = read(b"ccollections\nOrderedDict\n(]](U\x01aK\x01eatR.").unwrap();
        let root = dict.get(dict.root());
        assert!(
            matches!(root, Value::Dict(pairs) if pairs.len() == 1),
            "{dict:?}"
        );
    }

    /// What Python itself writes in its protocols 2, 4 and 5 of a dict with an `OrderedDict`, an
    /// `argparse.Namespace`, and a list of one of each kind of object.
    const PROTOCOLS: [&[u8]; 3] = [
        b"\x80\x02}q\x00(X\x02\x00\x00\x00odq\x01ccollections\nOrderedDict\nq\x02)Rq\x03X\x01\x00\x00\x00aq\x04K\x07sX\x02\x00\x00\x00nsq\x05cargparse\nNamespace\nq\x06)\x81q\x07}q\x08X\x01\x00\x00\x00bq\x09K\x01sbX\x03\x00\x00\x00allq\n]q\x0b(N\x88G@\x04\x00\x00\x00\x00\x00\x00\x8a\x0b\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01c_codecs\nencode\nq\x0cX\x01\x00\x00\x00xq\x0dX\x06\x00\x00\x00latin1q\x0e\x86q\x0fRq\x10c__builtin__\nset\nq\x11]q\x12K\x01a\x85q\x13Rq\x14c__builtin__\nfrozenset\nq\x15]q\x16K\x02a\x85q\x17Rq\x18c__builtin__\nbytearray\nq\x19h\x0cX\x01\x00\x00\x00yq\x1ah\x0e\x86q\x1bRq\x1c\x85q\x1dRq\x1eccollections\ndeque\nq\x1f)Rq K\x03accollections\ndefaultdict\nq!c__builtin__\nlist\nq\"\x85q#Rq$X\x01\x00\x00\x00cq%K\x04seu.",
        b"\x80\x04\x95\xe9\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x02od\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94\x8c\x01a\x94K\x07s\x8c\x02ns\x94\x8c\x08argparse\x94\x8c\x09Namespace\x94\x93\x94)\x81\x94}\x94\x8c\x01b\x94K\x01sb\x8c\x03all\x94]\x94(N\x88G@\x04\x00\x00\x00\x00\x00\x00\x8a\x0b\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01C\x01x\x94\x8f\x94(K\x01\x90(K\x02\x91\x94\x8c\x08builtins\x94\x8c\x09bytearray\x94\x93\x94C\x01y\x94\x85\x94R\x94h\x02\x8c\x05deque\x94\x93\x94)R\x94K\x03ah\x02\x8c\x0bdefaultdict\x94\x93\x94h\x13\x8c\x04list\x94\x93\x94\x85\x94R\x94\x8c\x01c\x94K\x04seu.",
        b"\x80\x05\x95\xdc\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x02od\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94\x8c\x01a\x94K\x07s\x8c\x02ns\x94\x8c\x08argparse\x94\x8c\x09Namespace\x94\x93\x94)\x81\x94}\x94\x8c\x01b\x94K\x01sb\x8c\x03all\x94]\x94(N\x88G@\x04\x00\x00\x00\x00\x00\x00\x8a\x0b\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01C\x01x\x94\x8f\x94(K\x01\x90(K\x02\x91\x94\x96\x01\x00\x00\x00\x00\x00\x00\x00y\x94h\x02\x8c\x05deque\x94\x93\x94)R\x94K\x03ah\x02\x8c\x0bdefaultdict\x94\x93\x94\x8c\x08builtins\x94\x8c\x04list\x94\x93\x94\x85\x94R\x94\x8c\x01c\x94K\x04seu.",
    ];

    #[test]
    fn whatever_python_writes_is_passed_over() {
        for pickle in PROTOCOLS {
            let pickle = read(pickle).unwrap();
            let Value::Dict(root) = pickle.get(pickle.root()) else {
                panic!("{pickle:?}");
            };
            let value = |name: &str| {
                let item = root
                    .iter()
                    .find(|&&(key, _)| pickle.text(key) == Some(name));
                pickle.get(item.unwrap().1)
            };
            let Value::Dict(ordered) = value("od") else {
                panic!("{pickle:?}");
            };
            assert_eq!(pickle.text(ordered[0].0), Some("a"));
            assert_eq!(*pickle.get(ordered[0].1), Value::Plain(Some(7)));
            assert!(matches!(value("ns"), Value::Call(..)));
            assert!(matches!(value("all"), Value::Sequence(items) if items.len() == 10));
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for pickle in [
            &b"."[..],
            b"R.",
            b"Q.",
            b"t.",
            b"u.",
            b"h\x01.",
            b"}K\x01s.",
            b"K\x01(\x86.",
            b"K\x01b.",
            b"NNR.",
            b"N)\x81.",
            b"K\x01a.",
            b"0.",
            b"1.",
            b"2.",
            b"X\xff\xff\xff\xffabc.",
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc.",
            b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffabc.",
            b"C\x04abc",
            b"ccollections\nOrderedDict\n(NtR.",
        ] {
            let error = read(pickle).unwrap_err();
            assert!(
                matches!(error, Fault::Damaged(_) | Fault::Truncated),
                "{pickle:?}: {error}"
            );
        }
    }

    /// Makes a tensor of two values.
    const TENSOR: &str = "ctorch._utils\n_rebuild_tensor_v2\n(\
        (U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x02tQK\0(K\x02t(K\x01tNNtR";

    #[test]
    fn tensors_are_known_by_their_calls() {
        let tensor = |text: &str| {
            let pickle = read(format!("{text}.").as_bytes()).unwrap();
            assert!(pickle.is_tensor(pickle.root()), "{text:?}");
            pickle.view(pickle.root())
        };
        let whole = tensor(TENSOR).unwrap();
        assert_eq!(
            (whole.offset, &whole.shape[..], whole.storage.len),
            (0, &[2][..], 2)
        );
        let arguments = TENSOR.replace("ctorch._utils\n_rebuild_tensor_v2\n", "");
        let arguments = arguments.strip_suffix('R').unwrap();
        for same in [
            format!("ctorch._utils\n_rebuild_parameter\n({TENSOR}NNtR"),
            format!("ctorch._utils\n_rebuild_parameter_with_state\n({TENSOR}NNNtR"),
            format!(
                "ctorch._tensor\n_rebuild_from_type_v2\n\
                 (ctorch._utils\n_rebuild_tensor_v2\ncmodel\nWeight\n{arguments}}}tR"
            ),
            TENSOR.replace("(K\x02t(K\x01t", "ctorch\nSize\n((K\x02ttR(K\x01t"),
        ] {
            assert_eq!(tensor(&same).as_ref(), Some(&whole), "{same:?}");
        }
        for (from, to) in [
            ("storage", "modules"),
            ("FloatS", "OtherS"),
            ("cpuK\x02", "cpuN"),
            ("cpuK\x02t", "cpuK\x02K\x01t"),
            ("QK\0", "QN"),
            ("tensor_v2", "tensor_v3"),
            ("(K\x02t", "(NNNNNNNNNt"),
            ("(K\x02t", "K\x02"),
            ("NNtR", "tR}}u"),
        ] {
            assert!(TENSOR.contains(from), "{from:?}");
            let changed = TENSOR.replacen(from, to, 1);
            match read(format!("{changed}.").as_bytes()) {
                Ok(pickle) => assert_eq!(pickle.view(pickle.root()), None, "{to:?}"),
                Err(error) => assert!(matches!(error, Fault::Damaged(_)), "{to:?}: {error}"),
            }
        }
        // A parameter that is made of itself.
        tensor("ctorch._utils\n_rebuild_parameter\n]q\0Rq\x01h\0h\x01a0");
    }

    #[test]
    fn short_pickles_do_not_grow() {
        // A list that has itself twice, over and over.
        let mut bomb = b"]q\x00".to_vec();
        for _ in 0..100_000 {
            bomb.extend(b"](h\x00h\x00eq\x00");
        }
        bomb.push(b'.');
        let pickle = read(&bomb).unwrap();
        assert!(pickle.values.len() < 200_000);
        // One so deep that no recursion comes back from it.
        let deep = [&b")"[..], &[0x85; 1 << 20], b"."].concat();
        read(&deep).unwrap();
        for part in [&b"N"[..], b"]", b"(", b"h\x00", b"\x94", b"2"] {
            let start = b"}q\x00";
            let mut long = io::Cursor::new(start).chain(Repeated(part, 0));
            let error = Pickle::read(&mut long).unwrap_err().to_string();
            assert!(error.contains("longer than the largest"), "{error}");
        }
        // What is passed over takes no memory, however long.
        let mut blob = io::Cursor::new(b"B\0\0\0\x01").chain(io::repeat(7).take(1 << 24));
        let mut blob = blob.by_ref().chain(&b"."[..]);
        assert_eq!(Pickle::read(&mut blob).unwrap().values.len(), 1);
        let mut blob = io::Cursor::new(b"B\xff\xff\xff\xff").chain(io::repeat(7));
        let error = Pickle::read(&mut blob).unwrap_err().to_string();
        assert!(error.contains("longer than the largest"), "{error}");
    }

    /// Some bytes again and again.
    struct Repeated(&'static [u8], usize);

    impl Read for Repeated {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            for byte in &mut *bytes {
                *byte = self.0[self.1 % self.0.len()];
                self.1 += 1;
            }
            Ok(bytes.len())
        }
    }

    /// Pieces of pickles.
    const PIECES: [&[u8]; 27] = [
        b"K\x01",
        b"(",
        b"t",
        b"}",
        b"]",
        b"u",
        b"s",
        b"a",
        b"e",
        b"q\x00",
        b"h\x00",
        b"R",
        b"Q",
        b"\x86",
        b"\x87",
        b")",
        b"b",
        b"U\x07storage",
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"\x81",
        b"\x90",
        b"0",
        b"1",
        b"2",
    ];

    proptest! {
        #[test]
        fn garbage_never_panics(
            pieces in proptest::collection::vec(proptest::sample::select(&PIECES), 0..60),
            garbage: Vec<u8>,
        ) {
            let _ = read(&garbage);
            if let Ok(pickle) = read(&[&pieces.concat()[..], b"."].concat()) {
                (0..pickle.len()).for_each(|id| drop(pickle.view(id)));
            }
        }
    }
}
