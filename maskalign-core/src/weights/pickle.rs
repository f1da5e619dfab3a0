//! Reads the pickles that hold PyTorch state dictionaries. It builds data and runs nothing: the few names it knows stand
//! for tensors, dictionaries and lists, and any other name is refused.
//!
//! Format: <https://docs.python.org/3/library/pickletools.html>, and PyTorch's `torch/_weights_only_unpickler.py` for what
//! a state dictionary needs.

use std::collections::HashMap;

use super::element::Element;

/// A value's place in [`Pickle`]. Values refer to each other by place, so that nesting makes no recursion, and what is
/// copied is counted: a hostile file cannot make more of either than a small multiple of its bytes.
pub(super) type Id = usize;

/// A value.
#[derive(Debug)]
pub(super) enum Node {
    /// A value of no interest here: none, a truth value, a float, bytes.
    Other,
    Int(i64),
    Text(String),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    /// A dictionary or an object's attributes, in order.
    Dict {
        entries: Vec<(Id, Id)>,
        kind: DictKind,
    },
    Class(Class),
    Storage(Box<Storage>),
    Tensor(Box<Tensor>),
}

/// Where a [`Node::Dict`] comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DictKind {
    /// Attributes set on a dictionary are bookkeeping and dropped.
    Dictionary,
    /// Attributes set on an object are its entries.
    Object,
}

/// The names a pickle may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    OrderedDict,
    RebuildTensorV2,
    RebuildTensor,
    RebuildParameter,
    /// `torch.Size` and TorchScript's typed lists: their one argument.
    Same,
    /// `argparse.Namespace` (official training checkpoints carry one) and TorchScript's modules: attributes only.
    Object,
    /// `torch.device`: dropped.
    Device,
    Storage(Element),
}

/// A stretch of numbers in an entry of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Storage {
    pub(super) element: Element,
    /// Name of the entry in `data/`.
    pub(super) key: String,
    /// Numbers in it.
    pub(super) count: usize,
}

/// A view into a storage.
#[derive(Debug, Clone)]
pub(super) struct Tensor {
    pub(super) storage: Storage,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// In numbers, one for each dimension.
    pub(super) strides: Vec<usize>,
}

/// A pickle's values.
#[derive(Debug)]
pub(super) struct Pickle {
    nodes: Vec<Node>,
    root: Id,
}

impl Pickle {
    /// Parses `bytes`, or says in words why not.
    pub(super) fn parse(bytes: &[u8]) -> Result<Pickle, String> {
        let machine = Machine {
            rest: bytes,
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            may_copy: bytes.len().saturating_mul(4),
        };
        machine.run()
    }

    pub(super) fn root(&self) -> Id {
        self.root
    }

    pub(super) fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// A dictionary's or object's entry.
    pub(super) fn get(&self, id: Id, key: &str) -> Option<Id> {
        let Node::Dict { entries, .. } = self.node(id) else {
            return None;
        };
        let is_key = |id: &Id| matches!(self.node(*id), Node::Text(text) if text == key);
        entries.iter().find(|(name, _)| is_key(name)).map(|(_, value)| *value)
    }
}

fn class_of(module: &str, name: &str) -> Option<Class> {
    Some(match (module, name) {
        ("collections", "OrderedDict") => Class::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2") => Class::RebuildTensorV2,
        ("torch._utils", "_rebuild_tensor") => Class::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => Class::RebuildParameter,
        ("torch", "Size") => Class::Same,
        ("torch.jit._pickle", "build_intlist" | "build_doublelist" | "build_boollist" | "build_tensorlist") => {
            Class::Same
        }
        ("torch", "device") => Class::Device,
        ("argparse", "Namespace") => Class::Object,
        (module, _) if module == "__torch__" || module.starts_with("__torch__.") => Class::Object,
        ("torch", "DoubleStorage") => Class::Storage(Element::F64),
        ("torch", "FloatStorage") => Class::Storage(Element::F32),
        ("torch", "HalfStorage") => Class::Storage(Element::F16),
        ("torch", "BFloat16Storage") => Class::Storage(Element::Bf16),
        ("torch", "LongStorage") => Class::Storage(Element::I64),
        ("torch", "IntStorage") => Class::Storage(Element::I32),
        ("torch", "ShortStorage") => Class::Storage(Element::I16),
        ("torch", "CharStorage") => Class::Storage(Element::I8),
        ("torch", "ByteStorage") => Class::Storage(Element::U8),
        ("torch", "BoolStorage") => Class::Storage(Element::Bool),
        _ => return None,
    })
}

struct Machine<'a> {
    rest: &'a [u8],
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Elements that instructions may still copy from earlier values.
    may_copy: usize,
}

type Step<T> = Result<T, String>;

impl Machine<'_> {
    fn run(mut self) -> Step<Pickle> {
        loop {
            let opcode = self.byte()?;
            if opcode == b'.' {
                let root = self.pop()?;
                return Ok(Pickle { nodes: self.nodes, root });
            }
            self.execute(opcode)?;
        }
    }

    fn execute(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            // PROTO, FRAME
            0x80 => {
                self.take(1)?;
            }
            0x95 => {
                self.take(8)?;
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'1' => {
                self.pop_to_mark()?;
            }
            // NONE, NEWTRUE, NEWFALSE
            b'N' | 0x88 | 0x89 => self.push(Node::Other),
            // BININT, BININT1, BININT2, LONG1, LONG4
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()));
            }
            b'K' => {
                let value = self.byte()?;
                self.push(Node::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()));
            }
            0x8a => {
                let length = self.byte()?.into();
                self.long(length)?;
            }
            0x8b => {
                let length = self.length4()?;
                self.long(length)?;
            }
            // BINFLOAT: no float matters to a state dictionary.
            b'G' => {
                self.take(8)?;
                self.push(Node::Other);
            }
            // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8, BINSTRING, SHORT_BINSTRING
            b'X' | b'T' => {
                let length = self.length4()?;
                self.text(length)?;
            }
            0x8c | b'U' => {
                let length = self.byte()?.into();
                self.text(length)?;
            }
            0x8d => {
                let length = self.length8()?;
                self.text(length)?;
            }
            // BINBYTES, SHORT_BINBYTES, BINBYTES8
            b'B' => {
                let length = self.length4()?;
                self.skipped(length)?;
            }
            b'C' => {
                let length = self.byte()?.into();
                self.skipped(length)?;
            }
            0x8e => {
                let length = self.length8()?;
                self.skipped(length)?;
            }
            b']' => self.push(Node::List(Vec::new())),
            b'l' => {
                let items = self.pop_to_mark()?;
                self.push(Node::List(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.extend_list(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.extend_list(items)?;
            }
            b')' => self.push(Node::Tuple(Vec::new())),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Tuple(items));
            }
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let start = self.stack.len().checked_sub(count).ok_or_else(underflow)?;
                if self.marks.last().is_some_and(|mark| start < *mark) {
                    return Err(underflow());
                }
                let items = self.stack.split_off(start);
                self.push(Node::Tuple(items));
            }
            b'}' => self.push(Node::Dict { entries: Vec::new(), kind: DictKind::Dictionary }),
            b'd' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Dict { entries: pairs(&items)?, kind: DictKind::Dictionary });
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.extend_dict(vec![(key, value)])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.extend_dict(pairs(&items)?)?;
            }
            // BINPUT, LONG_BINPUT, MEMOIZE
            b'q' => {
                let place = self.byte()?.into();
                self.remember(place)?;
            }
            b'r' => {
                let place = u32::from_le_bytes(self.array()?);
                self.remember(place)?;
            }
            0x94 => {
                let place = u32::try_from(self.memo.len()).map_err(|_| underflow())?;
                self.remember(place)?;
            }
            // BINGET, LONG_BINGET
            b'h' => {
                let place = self.byte()?.into();
                self.recall(place)?;
            }
            b'j' => {
                let place = u32::from_le_bytes(self.array()?);
                self.recall(place)?;
            }
            // GLOBAL, STACK_GLOBAL
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.global(&module, &name)?;
            }
            0x93 => {
                let name = self.pop()?;
                let module = self.pop()?;
                let (Node::Text(module), Node::Text(name)) = (&self.nodes[module], &self.nodes[name]) else {
                    return Err("a name in it is no text".into());
                };
                let (module, name) = (module.clone(), name.clone());
                self.spend(module.len() + name.len())?;
                self.global(&module, &name)?;
            }
            b'Q' => self.persistent()?,
            // REDUCE, NEWOBJ, BUILD
            b'R' => self.reduce()?,
            0x81 => self.new_object()?,
            b'b' => self.build()?,
            _ => {
                return Err(format!("its pickle uses the instruction {opcode:#04x}, which no state dictionary needs"));
            }
        }
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Step<()> {
        let class = class_of(module, name).ok_or_else(|| {
            format!(
                "its pickle asks for `{module}.{name}`, which is refused, since a pickle may run any code; save the plain \
                 state dictionary: `torch.save(model.state_dict(), FILE)`, or use safetensors"
            )
        })?;
        self.push(Node::Class(class));
        Ok(())
    }

    fn persistent(&mut self) -> Step<()> {
        let id = self.pop()?;
        let wrong = || "its pickle refers to a storage in an unknown way".to_owned();
        let &[tag, class, key, _device, count] = self.items(id).ok_or_else(wrong)? else {
            return Err(wrong());
        };
        let (Node::Text(tag), Node::Class(Class::Storage(element)), Node::Text(key), Some(count)) =
            (&self.nodes[tag], &self.nodes[class], &self.nodes[key], self.size(count))
        else {
            return Err(wrong());
        };
        if tag != "storage" {
            return Err(wrong());
        }
        let storage = Storage { element: *element, key: key.clone(), count };
        self.spend(storage.key.len())?;
        self.push(Node::Storage(Box::new(storage)));
        Ok(())
    }

    fn reduce(&mut self) -> Step<()> {
        let arguments = self.pop()?;
        let function = self.pop()?;
        let Node::Class(class) = self.nodes[function] else {
            return Err("its pickle calls what is no function".into());
        };
        let wrong = || format!("its pickle calls {class:?} with unknown arguments");
        let arguments = self.items(arguments).ok_or_else(wrong)?;
        match class {
            Class::OrderedDict => {
                let entries: Vec<_> = match arguments {
                    [] => Vec::new(),
                    [list, ..] => {
                        let pair = |id: &Id| match self.items(*id) {
                            Some(&[key, value]) => Some((key, value)),
                            _ => None,
                        };
                        let items = self.items(*list).ok_or_else(wrong)?;
                        items.iter().map(pair).collect::<Option<_>>().ok_or_else(wrong)?
                    }
                };
                self.spend(entries.len())?;
                self.push(Node::Dict { entries, kind: DictKind::Dictionary });
            }
            Class::RebuildTensorV2 | Class::RebuildTensor => {
                let &[storage, offset, shape, strides, ..] = arguments else {
                    return Err(wrong());
                };
                let Node::Storage(storage) = &self.nodes[storage] else {
                    return Err(wrong());
                };
                let tensor = Tensor {
                    storage: Storage::clone(storage),
                    offset: self.size(offset).ok_or_else(wrong)?,
                    shape: self.sizes(shape).ok_or_else(wrong)?,
                    strides: self.sizes(strides).ok_or_else(wrong)?,
                };
                if tensor.shape.len() != tensor.strides.len() {
                    return Err(wrong());
                }
                self.spend(tensor.storage.key.len() + 2 * tensor.shape.len())?;
                self.push(Node::Tensor(Box::new(tensor)));
            }
            Class::RebuildParameter | Class::Same => {
                let same = *arguments.first().ok_or_else(wrong)?;
                self.stack.push(same);
            }
            Class::Device => self.push(Node::Other),
            Class::Object => self.push(Node::Dict { entries: Vec::new(), kind: DictKind::Object }),
            Class::Storage(_) => return Err(wrong()),
        }
        Ok(())
    }

    fn new_object(&mut self) -> Step<()> {
        self.pop()?;
        let class = self.pop()?;
        match self.nodes[class] {
            Node::Class(Class::Object) => self.push(Node::Dict { entries: Vec::new(), kind: DictKind::Object }),
            Node::Class(Class::OrderedDict) => {
                self.push(Node::Dict { entries: Vec::new(), kind: DictKind::Dictionary });
            }
            _ => return Err("its pickle makes an object of an unknown class".into()),
        }
        Ok(())
    }

    fn build(&mut self) -> Step<()> {
        let state = self.pop()?;
        let target = self.top()?;
        let Node::Dict { kind, .. } = self.nodes[target] else {
            return Err("its pickle sets attributes of what has none".into());
        };
        if kind == DictKind::Object {
            let Node::Dict { entries, .. } = &self.nodes[state] else {
                return Err("its pickle sets attributes in an unknown way".into());
            };
            let added = entries.clone();
            self.spend(added.len())?;
            self.extend_dict(added)?;
        }
        Ok(())
    }

    fn extend_list(&mut self, added: Vec<Id>) -> Step<()> {
        let target = self.top()?;
        match &mut self.nodes[target] {
            Node::List(items) => items.extend(added),
            _ => return Err("its pickle appends to what is no list".into()),
        }
        Ok(())
    }

    fn extend_dict(&mut self, added: Vec<(Id, Id)>) -> Step<()> {
        let target = self.top()?;
        match &mut self.nodes[target] {
            Node::Dict { entries, .. } => entries.extend(added),
            _ => return Err("its pickle sets an entry of what is no dictionary".into()),
        }
        Ok(())
    }

    fn spend(&mut self, elements: usize) -> Step<()> {
        let left = self.may_copy.checked_sub(elements);
        self.may_copy = left.ok_or_else(|| "its pickle repeats itself far more than weights do".to_owned())?;
        Ok(())
    }

    fn items(&self, id: Id) -> Option<&[Id]> {
        match &self.nodes[id] {
            Node::Tuple(items) | Node::List(items) => Some(items),
            _ => None,
        }
    }

    fn size(&self, id: Id) -> Option<usize> {
        match self.nodes[id] {
            Node::Int(value) => value.try_into().ok(),
            _ => None,
        }
    }

    fn sizes(&self, id: Id) -> Option<Vec<usize>> {
        self.items(id)?.iter().map(|id| self.size(*id)).collect()
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }

    fn top(&self) -> Step<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.get(floor..).and_then(<[Id]>::last).copied().ok_or_else(underflow)
    }

    fn pop(&mut self) -> Step<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(underflow)?;
        Ok(self.stack.split_off(mark))
    }

    fn remember(&mut self, place: u32) -> Step<()> {
        let top = self.top()?;
        self.memo.insert(place, top);
        Ok(())
    }

    fn recall(&mut self, place: u32) -> Step<()> {
        let id = self.memo.get(&place).copied().ok_or_else(|| "its pickle recalls what it never stored".to_owned())?;
        self.stack.push(id);
        Ok(())
    }

    fn take(&mut self, count: usize) -> Step<&[u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or_else(|| "its pickle is truncated".to_owned())?;
        self.rest = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Step<u8> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn length4(&mut self) -> Step<usize> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn length8(&mut self) -> Step<usize> {
        usize::try_from(u64::from_le_bytes(self.array()?)).map_err(|_| "its pickle is truncated".to_owned())
    }

    fn line(&mut self) -> Step<String> {
        let end = self.rest.iter().take(4096).position(|byte| *byte == b'\n');
        let end = end.ok_or_else(|| "a name in its pickle does not end".to_owned())?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(line)
    }

    fn text(&mut self, length: usize) -> Step<()> {
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.push(Node::Text(text));
        Ok(())
    }

    fn skipped(&mut self, length: usize) -> Step<()> {
        self.take(length)?;
        self.push(Node::Other);
        Ok(())
    }

    /// A little-endian integer of any length; those beyond 64 bits are of no interest.
    fn long(&mut self, length: usize) -> Step<()> {
        let bytes = self.take(length)?;
        let node = match bytes {
            [] => Node::Int(0),
            bytes if bytes.len() <= 8 => {
                let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
                let mut wide = [if negative { 0xff } else { 0 }; 8];
                wide[..bytes.len()].copy_from_slice(bytes);
                Node::Int(i64::from_le_bytes(wide))
            }
            _ => Node::Other,
        };
        self.push(node);
        Ok(())
    }
}

fn pairs(items: &[Id]) -> Step<Vec<(Id, Id)>> {
    let (pairs, rest) = items.as_chunks::<2>();
    if !rest.is_empty() {
        return Err("its pickle has a key without a value".into());
    }
    Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect())
}

fn underflow() -> String {
    "its pickle takes more values than it made".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(bytes: &[u8]) -> String {
        Pickle::parse(bytes).unwrap_err()
    }

    #[test]
    fn a_pickle_that_would_run_code_is_refused_by_name() {
        // pickle.dumps of an object whose __reduce__ is (os.system, ("true",)), protocol 2
        let error = refusal(b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.");
        assert!(error.contains("`posix.system`") && error.contains("refused"), "{error}");
        let error = refusal(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.");
        assert!(error.contains("`builtins.eval`"), "{error}");
    }

    #[test]
    fn hostile_pickles_end_in_words() {
        for bytes in [
            &b""[..],
            b".",
            b"\x80",
            b"\x80\x02h\x00.",
            b"\x80\x02\x85.",
            b"\x80\x02(K\x01u.",
            b"\x80\x02}K\x01s.",
            b"\x80\x02K\x01)R.",
            b"\x80\x02X\xff\xff\xff\xffabc.",
            b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xff.",
            b"\x80\x02((t0tt.",
            b"\x80\x02K\x01Q.",
            b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
            b"\x80\x02K\x01}b.",
            b"\x80\x02c",
            b"I1\n.",
            b"\x80\x02i",
        ] {
            assert!(!refusal(bytes).is_empty(), "{bytes:?}");
        }
    }

    #[test]
    fn integers_of_all_widths_are_read() {
        let root = |bytes: &[u8]| {
            let pickle = Pickle::parse(bytes).unwrap();
            match pickle.node(pickle.root()) {
                Node::Int(value) => *value,
                other => panic!("{other:?}"),
            }
        };
        // pickle.dumps(V, protocol=2) of CPython
        assert_eq!(root(b"\x80\x02K\xff."), 255);
        assert_eq!(root(b"\x80\x02M\xff\xff."), 65535);
        assert_eq!(root(b"\x80\x02J\xff\xff\xff\xff."), -1);
        assert_eq!(root(b"\x80\x02\x8a\x05\x00\x00\x00\x00\x01."), 1 << 32);
        assert_eq!(root(b"\x80\x02\x8a\x05\x00\x00\x00\x00\xff."), -(1 << 32));
    }
}
