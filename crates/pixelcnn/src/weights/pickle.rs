//! The part of Python's pickles that PyTorch's state dicts need: a stack machine that makes plain
//! values and tensors' descriptions, calls nothing, and refuses by name whatever else a pickle asks
//! for.

use std::collections::HashMap;
use std::io::{Read, Take};

use super::Fault;

/// The longest pickle that is read: several times that of the largest model's state dict.
const MAX_PICKLE: u64 = 4 << 20;

/// The longest name of a storage, which is a number.
const MAX_KEY: usize = 100;

/// The most axes of a tensor.
const MAX_RANK: usize = 8;

/// Type of a storage's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// `float32`.
    F32,
    /// `float64`.
    F64,
    /// `float16`.
    F16,
    /// `bfloat16`.
    BF16,
    /// Something whole, which no parameter is.
    Other {
        /// Bytes of an element.
        size: usize,
    },
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::Other { size } => size,
        }
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

/// A tensor as a view of a storage, in elements; nothing of it is checked yet.
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
    /// A number, truth value or none: nothing that is looked at, but for whole numbers.
    Plain(Option<i64>),
    /// A text.
    Text(String),
    /// A tuple or list.
    Sequence(Vec<Id>),
    /// A dict, ordered or not.
    Dict(Vec<(Id, Id)>),
    /// A tensor or parameter.
    Tensor(View),
    /// A storage.
    Storage(Storage),
    /// Something that can be called.
    Global(Global),
}

/// What a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Global {
    /// `collections.OrderedDict`.
    OrderedDict,
    /// `torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`.
    Tensor,
    /// `torch._utils._rebuild_parameter`.
    Parameter,
    /// `torch.FloatStorage` and its like.
    Storage(Dtype),
}

impl Global {
    fn named(module: &str, name: &str) -> Result<Global, Fault> {
        let other = |size| Global::Storage(Dtype::Other { size });
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Global::Tensor,
            ("torch._utils", "_rebuild_parameter") => Global::Parameter,
            ("torch", "FloatStorage") => Global::Storage(Dtype::F32),
            ("torch", "DoubleStorage") => Global::Storage(Dtype::F64),
            ("torch", "HalfStorage") => Global::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Global::Storage(Dtype::BF16),
            ("torch", "LongStorage") => other(8),
            ("torch", "IntStorage") => other(4),
            ("torch", "ShortStorage") => other(2),
            ("torch", "CharStorage" | "ByteStorage" | "BoolStorage") => other(1),
            _ => {
                let named: String = format!("{module}.{name}").chars().take(100).collect();
                return Err(Fault::Refused(format!(
                    "its pickle asks for {named:?}, which no state dict needs: \
                     save the model's state_dict() alone"
                )));
            }
        })
    }
}

/// What a pickle holds.
#[derive(Debug)]
pub struct Pickle {
    values: Vec<Value>,
    root: Id,
}

impl Pickle {
    /// The value that was pickled.
    pub fn root(&self) -> &Value {
        &self.values[self.root]
    }

    /// A value inside another.
    pub fn get(&self, id: Id) -> &Value {
        &self.values[id]
    }

    /// Reads one pickle and nothing behind it.
    ///
    /// # Errors
    /// Where it is damaged, too long or asks for something that is not known here.
    pub fn read(file: &mut impl Read) -> Result<Pickle, Fault> {
        let mut machine = Machine {
            bytes: file.take(MAX_PICKLE),
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
}

fn broken() -> Fault {
    Fault::Damaged("its pickle makes no sense".into())
}

struct Machine<R> {
    bytes: Take<R>,
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
            b'N' => self.push(Value::Plain(None)),
            0x88 | 0x89 => self.push(Value::Plain(Some((op == 0x88).into()))),
            b'J' => self.int(|machine| Ok(i32::from_le_bytes(machine.array()?).into()))?,
            b'K' => self.int(|machine| Ok(u8::from_le_bytes(machine.array()?).into()))?,
            b'M' => self.int(|machine| Ok(u16::from_le_bytes(machine.array()?).into()))?,
            0x8a => self.long()?,
            b'G' => {
                self.array::<8>()?;
                self.push(Value::Plain(None));
            }
            // Texts; Python 2's are bytes.
            b'X' | b'T' => {
                let length = u32::from_le_bytes(self.array()?);
                self.text(length)?;
            }
            0x8c | b'U' => {
                let length = self.array::<1>()?[0];
                self.text(length.into())?;
            }
            // Tuples, lists, dicts.
            b'(' => self.marks.push(self.stack.len()),
            b')' | b']' => self.push(Value::Sequence(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            b't' => {
                let items = self.pop_mark()?;
                self.push(Value::Sequence(items));
            }
            0x85..=0x87 => {
                let from = self.top(op - 0x84)?;
                let items = self.stack.split_off(from);
                self.push(Value::Sequence(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' => {
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
            // The memo.
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
                self.push(Value::Global(Global::named(&module, &name)?));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) =
                    (&self.values[module], &self.values[name])
                else {
                    return Err(broken());
                };
                let global = Global::named(module, name)?;
                self.push(Value::Global(global));
            }
            b'R' => self.call()?,
            b'Q' => self.storage()?,
            // Attributes: a state dict has its modules' versions there.
            b'b' => {
                self.pop()?;
                let to = self.last()?;
                if !matches!(self.values[to], Value::Dict(_)) {
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
            Err(_) if self.bytes.limit() < N as u64 => Err(Fault::Refused(
                "its pickle is longer than the largest PixelCNN++'s".into(),
            )),
            read => Ok(read.map(|()| bytes)?),
        }
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len());
        self.values.push(value);
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

    fn pop_mark(&mut self) -> Result<Vec<Id>, Fault> {
        let mark = self.marks.pop().ok_or_else(broken)?;
        Ok(self.stack.split_off(mark))
    }

    fn extend(&mut self, items: Vec<Id>) -> Result<(), Fault> {
        let list = self.last()?;
        match &mut self.values[list] {
            Value::Sequence(list) => list.extend(items),
            _ => return Err(broken()),
        }
        Ok(())
    }

    fn update(&mut self, items: &[Id]) -> Result<(), Fault> {
        let dict = self.last()?;
        let (pairs, []) = items.as_chunks() else {
            return Err(broken());
        };
        match &mut self.values[dict] {
            Value::Dict(dict) => dict.extend(pairs.iter().map(|&[key, value]| (key, value))),
            _ => return Err(broken()),
        }
        Ok(())
    }

    fn memorize(&mut self, at: u32) -> Result<(), Fault> {
        let value = self.last()?;
        self.memo.insert(at, value);
        Ok(())
    }

    fn recall(&mut self, at: u32) -> Result<(), Fault> {
        let value = *self.memo.get(&at).ok_or_else(broken)?;
        self.stack.push(value);
        Ok(())
    }

    fn int(&mut self, read: impl Fn(&mut Self) -> Result<i64, Fault>) -> Result<(), Fault> {
        let value = read(self)?;
        self.push(Value::Plain(Some(value)));
        Ok(())
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
        self.push(Value::Plain(Some(value)));
        Ok(())
    }

    fn text(&mut self, length: u32) -> Result<(), Fault> {
        let mut text = Vec::new();
        self.bytes
            .by_ref()
            .take(length.into())
            .read_to_end(&mut text)?;
        if text.len() < length as usize {
            return Err(Fault::Truncated);
        }
        let text = String::from_utf8(text).map_err(|_| broken())?;
        self.push(Value::Text(text));
        Ok(())
    }

    fn line(&mut self) -> Result<String, Fault> {
        let mut line = Vec::new();
        loop {
            match self.array::<1>()?[0] {
                b'\n' => return String::from_utf8(line).map_err(|_| broken()),
                byte => line.push(byte),
            }
        }
    }

    fn sequence(&self, id: Id) -> Result<&[Id], Fault> {
        match &self.values[id] {
            Value::Sequence(items) => Ok(items),
            _ => Err(broken()),
        }
    }

    fn number(&self, id: Id) -> Result<u64, Fault> {
        match self.values[id] {
            Value::Plain(Some(number)) => u64::try_from(number).map_err(|_| broken()),
            _ => Err(broken()),
        }
    }

    fn numbers(&self, id: Id) -> Result<Vec<u64>, Fault> {
        let numbers = self.sequence(id)?;
        if numbers.len() > MAX_RANK {
            return Err(broken());
        }
        numbers.iter().map(|&id| self.number(id)).collect()
    }

    fn call(&mut self) -> Result<(), Fault> {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let Value::Global(callee) = self.values[callee] else {
            return Err(broken());
        };
        let arguments = self.sequence(arguments)?;
        let value = match (callee, arguments) {
            (Global::OrderedDict, []) => Value::Dict(Vec::new()),
            // Python 2 hands over its items.
            (Global::OrderedDict, &[items]) => {
                let pairs = self.sequence(items)?.iter();
                let pairs = pairs.map(|&pair| match self.sequence(pair)? {
                    &[key, value] => Ok((key, value)),
                    _ => Err(broken()),
                });
                let pairs = pairs.collect::<Result<_, Fault>>()?;
                // Moved, lest a short pickle make many copies.
                self.values[items] = Value::Plain(None);
                Value::Dict(pairs)
            }
            (Global::Tensor, &[storage, offset, shape, strides, ..]) => {
                let Value::Storage(storage) = &self.values[storage] else {
                    return Err(broken());
                };
                Value::Tensor(View {
                    storage: storage.clone(),
                    offset: self.number(offset)?,
                    shape: self.numbers(shape)?,
                    strides: self.numbers(strides)?,
                })
            }
            (Global::Parameter, &[tensor, ..]) => {
                if !matches!(self.values[tensor], Value::Tensor(_)) {
                    return Err(broken());
                }
                self.stack.push(tensor);
                return Ok(());
            }
            _ => return Err(broken()),
        };
        self.push(value);
        Ok(())
    }

    /// `('storage', type, key, location, number of elements)`; the older form adds of what larger
    /// storage it is a view.
    fn storage(&mut self) -> Result<(), Fault> {
        let id = self.pop()?;
        let (&[kind, dtype, key, _, len], view) =
            self.sequence(id)?.split_first_chunk().ok_or_else(broken)?;
        let (Value::Text(kind), Value::Global(Global::Storage(dtype)), Value::Text(key)) =
            (&self.values[kind], &self.values[dtype], &self.values[key])
        else {
            return Err(broken());
        };
        if kind != "storage" || key.len() > MAX_KEY {
            return Err(broken());
        }
        if let [view] = view
            && !matches!(self.values[*view], Value::Plain(None))
        {
            return Err(Fault::Refused(
                "its storages are views of larger ones: save it with a newer PyTorch".into(),
            ));
        }
        let storage = Storage {
            key: key.clone(),
            dtype: *dtype,
            len: self.number(len)?,
        };
        self.push(Value::Storage(storage));
        Ok(())
    }
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
        for (pickle, part) in [
            (&b"cposix\nsystem\n(Vls\ntR."[..], "\"posix.system\""),
            (
                b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
                "\"posix.system\"",
            ),
            (b"cbuiltins\neval\n.", "\"builtins.eval\""),
            (
                b"ctorch.serialization\nload\n.",
                "\"torch.serialization.load\"",
            ),
            (b"c__builtin__\ngetattr\n.", "which no state dict needs"),
            (b"ios\nsystem\n.", "the operation 0x69"),
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
        let plain = |pickle: &[u8]| match read(pickle).unwrap().root() {
            Value::Plain(number) => *number,
            other => panic!("{other:?}"),
        };
        assert_eq!(plain(b"K\xff."), Some(255));
        assert_eq!(plain(b"M\x01\x02."), Some(513));
        assert_eq!(plain(b"J\xfe\xff\xff\xff."), Some(-2));
        assert_eq!(plain(b"\x8a\x01\xfe."), Some(-2));
        assert_eq!(plain(b"\x8a\x03\x00\x00\x01."), Some(65536));
        assert_eq!(plain(b"\x8a\x00."), Some(0));
        assert_eq!(plain(b"N."), None);
        let dict = read(b"ccollections\nOrderedDict\n(]](U\x01aK\x01eatR.").unwrap();
        assert!(
            matches!(dict.root(), Value::Dict(pairs) if pairs.len() == 1),
            "{dict:?}"
        );
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
            b"K\x01a.",
            b"X\xff\xff\xff\xffabc.",
            b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
            b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuJ\xff\xff\xff\xfftQ.",
        ] {
            let error = read(pickle).unwrap_err();
            assert!(
                matches!(error, Fault::Damaged(_) | Fault::Truncated),
                "{error}"
            );
        }
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
        let long = vec![b'N'; 5 << 20];
        let error = read(&long).unwrap_err().to_string();
        assert!(error.contains("longer than the largest"), "{error}");
    }

    /// Pieces of pickles.
    const PIECES: [&[u8]; 21] = [
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
    ];

    proptest! {
        #[test]
        fn garbage_never_panics(
            pieces in proptest::collection::vec(proptest::sample::select(&PIECES), 0..60),
            garbage: Vec<u8>,
        ) {
            let _ = read(&garbage);
            let _ = read(&[&pieces.concat()[..], b"."].concat());
        }
    }
}
