//! Reads weights out of an ONNX file: the initialisers, and the nodes that tell what an anonymous one is for.
//!
//! It runs nothing and knows no operator. Only the handful of protobuf fields below are looked at, everything else
//! is skipped; the decoding itself (bounds, varints, a limit on nesting) is `prost`'s. Raw data are slices of the
//! one buffer that was read, so a file costs its own size and no more.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;

use crate::{Error, Result};

/// The numbers that ONNX gives to the two element types read here.
const FLOAT: i32 = 1;
const INT64: i32 = 7;

/// `TensorProto.data_location` of a tensor whose values lie in another file.
const EXTERNAL: i32 = 1;

// Field numbers are those of onnx.proto.

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphProto>,
}

#[derive(Clone, PartialEq, Message)]
struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    node: Vec<NodeProto>,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<TensorProto>,
}

#[derive(Clone, PartialEq, Message)]
struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    output: Vec<String>,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    op_type: String,
}

#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    #[prost(int64, repeated, tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(float, repeated, tag = "4")]
    float_data: Vec<f32>,
    #[prost(int64, repeated, tag = "7")]
    int64_data: Vec<i64>,
    #[prost(string, tag = "8")]
    name: String,
    #[prost(bytes = "bytes", tag = "9")]
    raw_data: Bytes,
    #[prost(int32, tag = "14")]
    data_location: i32,
}

/// One operation of the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name, such as `/encoder/layer.0/query/MatMul`; may be empty.
    pub name: String,
    /// The operator, such as `MatMul`.
    pub op_type: String,
    /// Names of what goes in: initialisers or other nodes' outputs.
    pub inputs: Vec<String>,
    /// Names of what comes out.
    pub outputs: Vec<String>,
}

/// The values of an initialiser, in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 64-bit integers.
    I64(Vec<i64>),
}

/// An initialiser: shape and values.
#[derive(Debug, Clone, PartialEq)]
pub struct Initializer {
    /// The size of each dimension; none for a scalar.
    pub shape: Vec<usize>,
    /// As many as the product of the shape.
    pub values: Values,
}

/// A parsed ONNX file.
#[derive(Debug)]
pub struct OnnxFile {
    origin: PathBuf,
    nodes: Vec<Node>,
    initializers: BTreeMap<String, TensorProto>,
}

impl OnnxFile {
    /// Reads and parses the file at `path`.
    ///
    /// # Errors
    /// If the file can't be read or is no ONNX model with a graph.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        Self::parse(bytes, path)
    }

    /// Parses `bytes`; `origin` is the file they came from, for error messages.
    ///
    /// # Errors
    /// If they are no ONNX model with a graph, or two initialisers have the same name.
    pub fn parse(bytes: Vec<u8>, origin: &Path) -> Result<Self> {
        let model = ModelProto::decode(Bytes::from(bytes))
            .map_err(|err| Error::file(origin, format!("not a readable ONNX file: {err}")))?;
        let graph = model
            .graph
            .ok_or_else(|| Error::file(origin, "not an ONNX model: it holds no graph"))?;
        let mut initializers = BTreeMap::new();
        for tensor in graph.initializer {
            let name = tensor.name.clone();
            if initializers.insert(name.clone(), tensor).is_some() {
                return Err(Error::file(origin, format!("initialiser {name} is there twice")));
            }
        }
        let nodes = graph
            .node
            .into_iter()
            .map(|n| Node { name: n.name, op_type: n.op_type, inputs: n.input, outputs: n.output })
            .collect();
        Ok(Self { origin: origin.to_path_buf(), nodes, initializers })
    }

    /// The operations, in the file's order.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The names of all initialisers, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.initializers.keys().map(String::as_str)
    }

    /// The operation called `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .ok_or_else(|| self.error(format!("no node is called {name}")))
    }

    /// The initialiser called `name`.
    ///
    /// # Errors
    /// If there is none, it is neither f32 nor i64, its values lie in another file, or their number is not what
    /// the shape says.
    pub fn initializer(&self, name: &str) -> Result<Initializer> {
        let tensor = self
            .initializers
            .get(name)
            .ok_or_else(|| self.error(format!("no initialiser is called {name}")))?;
        if tensor.data_location == EXTERNAL {
            return Err(self.error(format!("the values of {name} lie in another file")));
        }
        let (shape, count) = dims(&tensor.dims).ok_or_else(|| {
            self.error(format!("initialiser {name} has the shape {:?}", tensor.dims))
        })?;
        let raw = &tensor.raw_data;
        let values = match tensor.data_type {
            FLOAT if raw.is_empty() => Values::F32(tensor.float_data.clone()),
            INT64 if raw.is_empty() => Values::I64(tensor.int64_data.clone()),
            FLOAT => Values::F32(numbers(raw, f32::from_le_bytes)),
            INT64 => Values::I64(numbers(raw, i64::from_le_bytes)),
            other => {
                return Err(self.error(format!(
                    "initialiser {name} has ONNX element type {other}; only f32 (1) and i64 (7) are read"
                )));
            }
        };
        let (found, size) = match &values {
            Values::F32(values) => (values.len(), 4),
            Values::I64(values) => (values.len(), 8),
        };
        if found != count || raw.len() % size != 0 {
            return Err(self.error(format!(
                "initialiser {name} of shape {shape:?} holds {found} values ({} raw bytes), not {count}",
                raw.len()
            )));
        }
        Ok(Initializer { shape, values })
    }

    /// The f32 initialiser called `name`, which must have `shape`.
    ///
    /// # Errors
    /// As [`OnnxFile::initializer`]; also if type or shape are others.
    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let found = self.initializer(name)?;
        match found.values {
            Values::F32(values) if found.shape == shape => Ok(values),
            Values::F32(_) => Err(self.error(format!(
                "initialiser {name} has shape {:?}, expected {shape:?}",
                found.shape
            ))),
            Values::I64(_) => Err(self.error(format!("initialiser {name} is i64, expected f32"))),
        }
    }

    fn error(&self, reason: String) -> Error {
        Error::file(&self.origin, reason)
    }
}

/// Shape and number of values; `None` if a dimension is negative or the product overflows.
fn dims(dims: &[i64]) -> Option<(Vec<usize>, usize)> {
    let shape: Vec<usize> = dims.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<_>>()?;
    let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    Some((shape, count))
}

fn numbers<const N: usize, T>(raw: &[u8], read: fn([u8; N]) -> T) -> Vec<T> {
    raw.as_chunks::<N>().0.iter().map(|&chunk| read(chunk)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, dims: &[i64], data_type: i32, raw: Vec<u8>) -> TensorProto {
        TensorProto {
            dims: dims.to_vec(),
            data_type,
            name: name.into(),
            raw_data: raw.into(),
            ..TensorProto::default()
        }
    }

    fn f32_bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn encode(initializer: Vec<TensorProto>) -> Vec<u8> {
        let node = NodeProto {
            input: vec!["x".into(), "w".into()],
            output: vec!["y".into()],
            name: "/layer/MatMul".into(),
            op_type: "MatMul".into(),
        };
        ModelProto { graph: Some(GraphProto { node: vec![node], initializer }) }.encode_to_vec()
    }

    fn parse(bytes: Vec<u8>) -> Result<OnnxFile> {
        OnnxFile::parse(bytes, Path::new("model.onnx"))
    }

    fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
        let message = result.unwrap_err().to_string();
        assert!(message.starts_with("model.onnx: "), "{message}");
        message
    }

    #[test]
    fn reads_names_shapes_values_and_nodes() {
        let ids = TensorProto {
            dims: vec![2],
            data_type: INT64,
            name: "ids".into(),
            int64_data: vec![7, -1],
            ..TensorProto::default()
        };
        let file = parse(encode(vec![
            tensor("w", &[2, 3], FLOAT, f32_bytes(&[1., 2., 3., 4., 5., 6.])),
            tensor("scalar", &[], FLOAT, f32_bytes(&[0.5])),
            tensor("axes", &[1], INT64, (-2i64).to_le_bytes().to_vec()),
            ids,
        ]))
        .unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["axes", "ids", "scalar", "w"]);
        assert_eq!(file.f32("w", &[2, 3]).unwrap(), [1., 2., 3., 4., 5., 6.]);
        assert_eq!(file.f32("scalar", &[]).unwrap(), [0.5]);
        assert_eq!(file.initializer("axes").unwrap().values, Values::I64(vec![-2]));
        assert_eq!(file.initializer("ids").unwrap().values, Values::I64(vec![7, -1]));
        assert_eq!(file.nodes().len(), 1);
        let node = file.node("/layer/MatMul").unwrap();
        assert_eq!((node.op_type.as_str(), node.inputs[1].as_str()), ("MatMul", "w"));
        assert_eq!(node.outputs, ["y"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let file = parse(encode(vec![
            tensor("short", &[3], FLOAT, f32_bytes(&[1., 2.])),
            tensor("ragged", &[1], FLOAT, vec![0; 5]),
            tensor("negative", &[-1], FLOAT, vec![]),
            tensor("huge", &[i64::MAX, i64::MAX], FLOAT, vec![]),
            tensor("double", &[1], 11, vec![0; 8]),
            tensor("axes", &[1], INT64, vec![0; 8]),
            TensorProto { data_location: EXTERNAL, ..tensor("far", &[1], FLOAT, vec![]) },
        ]))
        .unwrap();
        for (name, reason) in [
            ("short", "holds 2 values (8 raw bytes), not 3"),
            ("ragged", "5 raw bytes"),
            ("negative", "[-1]"),
            ("huge", "9223372036854775807"),
            ("double", "element type 11"),
            ("far", "another file"),
            ("absent", "no initialiser is called absent"),
        ] {
            let message = message(file.initializer(name));
            assert!(message.contains(name) && message.contains(reason), "{message}");
        }
        assert!(message(file.f32("axes", &[1])).contains("i64, expected f32"));
        assert!(message(file.f32("short", &[2])).contains("not 3"));
        assert!(message(file.node("/none")).contains("/none"));
    }

    #[test]
    fn the_same_name_twice_is_refused() {
        let twice = vec![tensor("w", &[0], FLOAT, vec![]), tensor("w", &[0], FLOAT, vec![])];
        assert!(message(parse(encode(twice))).contains("w is there twice"));
    }

    #[test]
    fn hostile_bytes_are_errors_and_never_panics() {
        let good = encode(vec![tensor("w", &[2], FLOAT, f32_bytes(&[1., 2.]))]);
        assert!(message(parse(vec![])).contains("no graph"));
        for cut in 1..good.len() {
            // The graph is the only top-level field: every cut goes through it.
            message(parse(good[..cut].to_vec()));
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                if let Ok(file) = parse(bad) {
                    let names: Vec<String> = file.names().map(String::from).collect();
                    names.iter().for_each(|name| drop(file.initializer(name)));
                }
            }
        }
        // A length far beyond the file, a varint without end, and groups nested without end.
        message(parse(vec![0x3a, 0xff, 0xff, 0xff, 0xff, 0x0f]));
        message(parse(vec![0xff; 64]));
        message(parse(vec![0x0b; 1 << 20]));
    }
}
