//! Python pickles, looked at and never run.
//!
//! A pickle is a program for a stack machine that may import and call anything. This reader keeps the machine and leaves out
//! the calls: `REDUCE` and its like make an [`Node::Object`] that says what would have been called with what. Values live in one
//! arena and refer to each other by number, so that cyclic and deeply nested ones need neither recursion nor reference counts.

use std::collections::HashMap;

/// The number of a value in its [`Pickle`].
pub(crate) type Id = usize;

/// One value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Node {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than eight bytes, little-endian.
    BigInt(Vec<u8>),
    /// Tensors' files need no such number; that it is one is enough.
    Float,
    Str(String),
    Bytes,
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// `module.name`.
    Global(String),
    /// What the writer keeps elsewhere: for tensors, their storage.
    Persistent(Id),
    /// The result of calling `callable` with `args`; `items` were set on it afterwards.
    Object {
        callable: Id,
        args: Id,
        items: Vec<(Id, Id)>,
    },
}

/// A pickle that was read: all values, and which of them is the result.
#[derive(Debug)]
pub(crate) struct Pickle {
    nodes: Vec<Node>,
    root: Id,
    /// Bytes that the pickle took.
    pub(crate) len: usize,
}

/// A reason why bytes are no pickle, for people.
type Result<T> = std::result::Result<T, String>;

impl Pickle {
    /// Reads the pickle at the start of `bytes`; `allowed` says which globals may be named at all.
    pub(crate) fn read(bytes: &[u8], allowed: impl Fn(&str) -> bool) -> Result<Self> {
        let mut machine = Machine {
            bytes,
            at: 0,
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        let root = machine.run(&allowed).map_err(|why| format!("{why} (byte {})", machine.at))?;
        Ok(Self { nodes: machine.nodes, root, len: machine.at })
    }

    pub(crate) fn root(&self) -> Id {
        self.root
    }

    /// How many values there are; their numbers are below it.
    pub(crate) fn count(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn get(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    pub(crate) fn str(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Node::Str(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn int(&self, id: Id) -> Option<i64> {
        match self.get(id) {
            Node::Int(number) => Some(*number),
            _ => None,
        }
    }

    pub(crate) fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Node::Tuple(items) => Some(items),
            _ => None,
        }
    }

    pub(crate) fn global(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Node::Global(name) => Some(name),
            _ => None,
        }
    }

    /// What is called, by name, and with what.
    pub(crate) fn call(&self, id: Id) -> Option<(&str, &[Id])> {
        match self.get(id) {
            Node::Object { callable, args, .. } => {
                Some((self.global(*callable)?, self.tuple(*args)?))
            }
            _ => None,
        }
    }

    /// The entries of a dictionary, ordered or not.
    pub(crate) fn entries(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Node::Dict(items) => Some(items),
            Node::Object { callable, items, .. }
                if self.global(*callable) == Some("collections.OrderedDict") =>
            {
                Some(items)
            }
            _ => None,
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

impl Machine<'_> {
    /// Every operation takes at least a byte and makes at most one value, so the file's size bounds time and memory.
    fn run(&mut self, allowed: &dyn Fn(&str) -> bool) -> Result<Id> {
        loop {
            match self.byte()? {
                b'.' => return self.pop(),
                0x80 => {
                    let version = self.byte()?;
                    if version > 5 {
                        return Err(format!("protocol {version}; 5 is the newest that is known"));
                    }
                }
                0x95 => drop(self.take(8)?),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'1' => drop(self.pop_mark()?),
                b'2' => {
                    let top = self.top()?;
                    self.stack.push(top);
                }
                op @ (b'N' | 0x88 | 0x89 | b'I' | b'J' | b'K' | b'M' | b'L' | 0x8a | 0x8b
                | b'F' | b'G') => self.number(op)?,
                op @ (b'S' | b'T' | b'U' | b'V' | b'X' | 0x8c | 0x8d | b'B' | b'C' | 0x8e
                | 0x96) => {
                    self.text(op)?;
                }
                op @ (b')'
                | b't'
                | 0x85..=0x87
                | b']'
                | b'l'
                | b'a'
                | b'e'
                | b'}'
                | b'd'
                | b's'
                | b'u'
                | 0x8f..=0x91) => self.container(op)?,
                op @ (b'c' | 0x93 | b'R' | 0x81 | 0x92 | b'o' | b'i' | b'b') => {
                    self.object(op, allowed)?;
                }
                b'P' => {
                    let id = self.line()?;
                    let id = self.add(Node::Str(id));
                    self.push(Node::Persistent(id));
                }
                b'Q' => {
                    let id = self.pop()?;
                    self.push(Node::Persistent(id));
                }
                op @ (b'g' | b'h' | b'j' | b'p' | b'q' | b'r' | 0x94) => self.memory(op)?,
                op => return Err(format!("operation {op:#04x} is not one of a pickle")),
            }
        }
    }

    fn number(&mut self, op: u8) -> Result<()> {
        let node = match op {
            b'N' => Node::None,
            0x88 => Node::Bool(true),
            0x89 => Node::Bool(false),
            b'J' => {
                let bytes = self.take(4)?;
                Node::Int(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).into())
            }
            b'K' => Node::Int(self.byte()?.into()),
            b'M' => Node::Int(self.uint(2)? as i64),
            b'I' | b'L' => {
                let line = self.line()?;
                match line.as_str() {
                    "00" => Node::Bool(false),
                    "01" => Node::Bool(true),
                    digits => {
                        let parsed = digits.trim_end_matches('L').parse();
                        Node::Int(parsed.map_err(|_| format!("{digits:?} is not a number"))?)
                    }
                }
            }
            0x8a | 0x8b => {
                let len = self.uint(if op == 0x8a { 1 } else { 4 })? as usize;
                long(self.take(len)?)
            }
            b'F' => {
                self.line()?;
                Node::Float
            }
            _ => {
                self.take(8)?;
                Node::Float
            }
        };
        self.push(node);
        Ok(())
    }

    fn text(&mut self, op: u8) -> Result<()> {
        let node = match op {
            b'S' | b'V' => {
                Node::Str(self.line()?.trim_matches(|c| c == '\'' || c == '"').to_owned())
            }
            _ => {
                let len = self.uint(match op {
                    b'U' | 0x8c | b'C' => 1,
                    b'T' | b'X' | b'B' => 4,
                    _ => 8,
                })?;
                let bytes = self.take(usize::try_from(len).unwrap_or(usize::MAX))?;
                match op {
                    b'B' | b'C' | 0x8e | 0x96 => Node::Bytes,
                    _ => Node::Str(String::from_utf8_lossy(bytes).into_owned()),
                }
            }
        };
        self.push(node);
        Ok(())
    }

    fn container(&mut self, op: u8) -> Result<()> {
        match op {
            b')' => self.push(Node::Tuple(Vec::new())),
            b't' => {
                let items = self.pop_mark()?;
                self.push(Node::Tuple(items));
            }
            0x85..=0x87 => {
                let len = usize::from(op - 0x84);
                let first = self.stack.len().checked_sub(len).ok_or("the stack is empty")?;
                let items = self.stack.split_off(first);
                self.push(Node::Tuple(items));
            }
            b']' | 0x8f => self.push(Node::List(Vec::new())),
            b'l' | 0x91 => {
                let items = self.pop_mark()?;
                self.push(Node::List(items));
            }
            b'}' => self.push(Node::Dict(Vec::new())),
            b'd' => {
                let items = self.pop_mark()?;
                self.push(Node::Dict(pairs(&items)?));
            }
            b'a' => {
                let item = self.pop()?;
                self.extend_list(&[item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_mark()?;
                self.extend_list(&items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(&[(key, value)])?;
            }
            _ => {
                let items = self.pop_mark()?;
                self.set_items(&pairs(&items)?)?;
            }
        }
        Ok(())
    }

    fn object(&mut self, op: u8, allowed: &dyn Fn(&str) -> bool) -> Result<()> {
        match op {
            b'c' => {
                let name = format!("{}.{}", self.line()?, self.line()?);
                self.push_global(name, allowed)
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Node::Str(module), Node::Str(name)) = (&self.nodes[module], &self.nodes[name])
                else {
                    return Err("a global without a name".into());
                };
                self.push_global(format!("{module}.{name}"), allowed)
            }
            b'R' | 0x81 => {
                let (args, callable) = (self.pop()?, self.pop()?);
                self.push(Node::Object { callable, args, items: Vec::new() });
                Ok(())
            }
            0x92 => {
                let (_named, args, callable) = (self.pop()?, self.pop()?, self.pop()?);
                self.push(Node::Object { callable, args, items: Vec::new() });
                Ok(())
            }
            b'o' | b'i' => {
                let mut args = self.pop_mark()?;
                let callable = if op == b'i' {
                    let name = format!("{}.{}", self.line()?, self.line()?);
                    self.push_global(name, allowed)?;
                    self.pop()?
                } else if args.is_empty() {
                    return Err("an object of no class".into());
                } else {
                    args.remove(0)
                };
                let args = self.add(Node::Tuple(args));
                self.push(Node::Object { callable, args, items: Vec::new() });
                Ok(())
            }
            // The state of an object: no tensor keeps anything there.
            _ => self.pop().map(drop),
        }
    }

    fn memory(&mut self, op: u8) -> Result<()> {
        let key = match op {
            b'g' | b'p' => {
                let line = self.line()?;
                line.parse().map_err(|_| format!("{line:?} is not a place in memory"))?
            }
            b'h' | b'q' => self.uint(1)?,
            b'j' | b'r' => self.uint(4)?,
            _ => self.memo.len() as u64,
        };
        if matches!(op, b'g' | b'h' | b'j') {
            let id = *self.memo.get(&key).ok_or_else(|| format!("nothing is kept at {key}"))?;
            self.stack.push(id);
        } else {
            let top = self.top()?;
            self.memo.insert(key, top);
        }
        Ok(())
    }

    fn push_global(&mut self, name: String, allowed: &dyn Fn(&str) -> bool) -> Result<()> {
        if !allowed(&name) {
            return Err(format!(
                "it names {name}, which no file of weights needs; nothing of it was run"
            ));
        }
        self.push(Node::Global(name));
        Ok(())
    }

    fn extend_list(&mut self, items: &[Id]) -> Result<()> {
        let list = self.top()?;
        match &mut self.nodes[list] {
            Node::List(list) => list.extend_from_slice(items),
            _ => return Err("items for something that is no list".into()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[(Id, Id)]) -> Result<()> {
        let dict = self.top()?;
        match &mut self.nodes[dict] {
            Node::Dict(dict) | Node::Object { items: dict, .. } => dict.extend_from_slice(items),
            _ => return Err("entries for something that is no dictionary".into()),
        }
        Ok(())
    }

    fn add(&mut self, node: Node) -> Id {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn push(&mut self, node: Node) {
        let id = self.add(node);
        self.stack.push(id);
    }

    fn pop(&mut self) -> Result<Id> {
        let below = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= below {
            return Err("the stack is empty".into());
        }
        self.stack.pop().ok_or_else(|| "the stack is empty".into())
    }

    fn top(&self) -> Result<Id> {
        self.stack.last().copied().ok_or_else(|| "the stack is empty".into())
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().ok_or("no mark on the stack")?;
        if mark > self.stack.len() {
            return Err("a mark above the stack".into());
        }
        Ok(self.stack.split_off(mark))
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn take(&mut self, len: usize) -> Result<&[u8]> {
        let left = self.bytes.len() - self.at;
        if len > left {
            return Err(format!("{len} bytes are wanted, {left} are left"));
        }
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(taken)
    }

    /// A little-endian number of `len` ≤ 8 bytes.
    fn uint(&mut self, len: usize) -> Result<u64> {
        let bytes = self.take(len)?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn line(&mut self) -> Result<String> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|byte| *byte == b'\n').ok_or("a line without an end")?;
        let line = String::from_utf8_lossy(&rest[..end]).into_owned();
        self.at += end + 1;
        Ok(line)
    }
}

/// A two's-complement number, little-endian, of any length.
fn long(bytes: &[u8]) -> Node {
    if bytes.len() > 8 {
        return Node::BigInt(bytes.to_vec());
    }
    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut all = [if negative { 0xff } else { 0 }; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    Node::Int(i64::from_le_bytes(all))
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>> {
    if !items.len().is_multiple_of(2) {
        return Err("a key without a value".into());
    }
    Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_filled_after_they_were_kept_are_filled_everywhere() {
        // l = []; d = {"a": l, "b": l}; l.append(-2)
        let bytes =
            b"\x80\x02}q\x00(X\x01\x00\x00\x00a]q\x01J\xfe\xff\xff\xffaX\x01\x00\x00\x00bh\x01u.";
        let pickle = Pickle::read(bytes, |_| false).unwrap();
        assert_eq!(pickle.len, bytes.len());
        let entries = pickle.entries(pickle.root()).unwrap();
        for (entry, name) in entries.iter().zip(["a", "b"]) {
            assert_eq!(pickle.str(entry.0), Some(name));
            let Node::List(items) = pickle.get(entry.1) else { panic!("no list") };
            assert_eq!(pickle.int(items[0]), Some(-2));
        }
    }

    #[test]
    fn what_is_not_allowed_is_named_and_not_run() {
        let bytes = b"cposix\nsystem\n(S'touch /should-not-exist'\ntR.";
        let error = Pickle::read(bytes, |_| false).unwrap_err();
        assert!(error.contains("it names posix.system"), "{error}");
        let stacked = b"\x80\x04\x8c\x02os\x8c\x06system\x93.";
        assert!(Pickle::read(stacked, |_| false).unwrap_err().contains("os.system"));
    }

    #[test]
    fn endless_nesting_and_cycles_are_only_numbers() {
        let mut deep = vec![b'N'];
        deep.resize(2_000_000, 0x85);
        deep.push(b'.');
        assert_eq!(Pickle::read(&deep, |_| false).unwrap().nodes.len(), 2_000_000);
        let cycle = b"]q\x00h\x00a.";
        let pickle = Pickle::read(cycle, |_| false).unwrap();
        assert_eq!(pickle.get(pickle.root()), &Node::List(vec![pickle.root()]));
    }

    #[test]
    fn whatever_the_bytes_are_there_is_an_answer() {
        let whole =
            b"\x80\x02}q\x00(X\x01\x00\x00\x00a]q\x01J\xfe\xff\xff\xffaX\x01\x00\x00\x00bh\x01u.";
        let mut state = 1u64;
        for _ in 0..20_000 {
            let mut bytes = whole.to_vec();
            for _ in 0..3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (state >> 33) as usize % bytes.len();
                bytes[at] = (state >> 13) as u8;
            }
            let _ = Pickle::read(&bytes, |_| true);
        }
    }
}
