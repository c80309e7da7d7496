//! The tensors of a checkpoint folder, memory-mapped.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use blockplane_protocol::DType;
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use xxhash_rust::xxh3::Xxh3;

use super::config::read_json;
use super::error::LoadError;
use crate::ops::MatrixView;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// All weight files of a checkpoint, mapped, with their tables of contents.
///
/// The files must not be changed while they are mapped: replace a checkpoint by renaming, not by
/// writing into it.
#[derive(Debug)]
pub(super) struct Checkpoint {
    /// Named by errors about tensors that no file has.
    contents: PathBuf,
    shards: Vec<Shard>,
    /// Which shard has which tensor.
    tensors: HashMap<String, usize>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the data begins.
    data: usize,
}

/// Where a matrix is in a [`Checkpoint`].
#[derive(Clone, Debug)]
pub(super) struct Place {
    shard: usize,
    start: usize,
    end: usize,
    dtype: DType,
    rows: usize,
    columns: usize,
}

impl Checkpoint {
    /// Maps `model.safetensors`, or the files named by `model.safetensors.index.json`.
    pub(super) fn open(folder: &Path) -> Result<Self, LoadError> {
        let index = folder.join(INDEX);
        let single = folder.join(SINGLE);
        if index.exists() {
            return Self::open_sharded(folder, index);
        }
        if !single.exists() {
            return Err(LoadError::NoWeights {
                folder: folder.to_owned(),
            });
        }
        let shard = Shard::open(single.clone())?;
        let tensors = shard
            .metadata
            .offset_keys()
            .into_iter()
            .map(|name| (name, 0))
            .collect();
        Ok(Self {
            contents: single,
            shards: vec![shard],
            tensors,
        })
    }

    fn open_sharded(folder: &Path, index: PathBuf) -> Result<Self, LoadError> {
        let json = read_json(&index)?;
        let malformed = |what: &str| LoadError::Json {
            path: index.clone(),
            source: serde::de::Error::custom(what.to_owned()),
        };
        let map = json
            .get("weight_map")
            .and_then(serde_json::Value::as_object)
            .ok_or_else(|| malformed("weight_map is missing or not an object"))?;
        let mut files: BTreeMap<&str, usize> = BTreeMap::new();
        let mut shards = Vec::new();
        let mut tensors = HashMap::with_capacity(map.len());
        for (tensor, file) in map {
            let file = file
                .as_str()
                .ok_or_else(|| malformed("weight_map has a value that is not a file name"))?;
            let shard = if let Some(&shard) = files.get(file) {
                shard
            } else {
                if Path::new(file).file_name() != Some(file.as_ref()) {
                    return Err(LoadError::ShardName {
                        path: index,
                        file: file.to_owned(),
                    });
                }
                shards.push(Shard::open(folder.join(file))?);
                files.insert(file, shards.len() - 1);
                shards.len() - 1
            };
            tensors.insert(tensor.clone(), shard);
        }
        Ok(Self {
            contents: index,
            shards,
            tensors,
        })
    }

    /// Names the weights: equal where every tensor has the same name, type, shape and contents, in
    /// however many files. Reads all of them.
    pub(super) fn digest(&self) -> u64 {
        let mut names: Vec<_> = self.tensors.iter().collect();
        names.sort_unstable();
        let mut digest = Xxh3::new();
        for (name, &shard) in names {
            let shard = &self.shards[shard];
            if let Some(info) = shard.metadata.info(name) {
                let (start, end) = info.data_offsets;
                digest.update(format!("{name} {:?} {:?};", info.dtype, info.shape).as_bytes());
                digest.update(&shard.map[shard.data + start..shard.data + end]);
            }
        }
        digest.digest()
    }

    /// Finds a matrix of `rows x columns`.
    pub(super) fn matrix(
        &self,
        tensor: &str,
        rows: usize,
        columns: usize,
    ) -> Result<Place, LoadError> {
        let (dtype, shard, (start, end)) = self.find(tensor, &[rows, columns])?;
        Ok(Place {
            shard,
            start,
            end,
            dtype,
            rows,
            columns,
        })
    }

    /// The matrix at a place that [`matrix`](Self::matrix) found.
    pub(super) fn view(&self, place: &Place) -> MatrixView<'_> {
        let shard = &self.shards[place.shard];
        MatrixView {
            data: &shard.map[place.start..place.end],
            dtype: place.dtype,
            rows: place.rows,
            columns: place.columns,
        }
    }

    /// Reads a vector of `length` numbers.
    pub(super) fn vector(&self, tensor: &str, length: usize) -> Result<Vec<f32>, LoadError> {
        let (dtype, shard, (start, end)) = self.find(tensor, &[length])?;
        let view = MatrixView {
            data: &self.shards[shard].map[start..end],
            dtype,
            rows: 1,
            columns: length,
        };
        Ok(view.to_f32())
    }

    /// Forgets the pages of weights that have been packed; they are read again if needed.
    pub(super) fn release(&self) {
        #[cfg(unix)]
        for shard in &self.shards {
            // SAFETY: the mapping is read-only and backed by a file, so pages that go are read
            // back from it unchanged.
            let advised = unsafe {
                shard
                    .map
                    .unchecked_advise(memmap2::UncheckedAdvice::DontNeed)
            };
            if let Err(error) = advised {
                // They stay in memory until the system needs it: nothing is wrong.
                tracing::debug!(path = %shard.path.display(), %error, "pages not released");
            }
        }
    }

    fn find(
        &self,
        tensor: &str,
        shape: &[usize],
    ) -> Result<(DType, usize, (usize, usize)), LoadError> {
        let missing = |path: &Path| LoadError::MissingTensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
        };
        let &index = self
            .tensors
            .get(tensor)
            .ok_or_else(|| missing(&self.contents))?;
        let shard = &self.shards[index];
        let info = shard
            .metadata
            .info(tensor)
            .ok_or_else(|| missing(&shard.path))?;
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            other => {
                return Err(LoadError::TensorDType {
                    path: shard.path.clone(),
                    tensor: tensor.to_owned(),
                    found: other.to_string(),
                });
            }
        };
        if info.shape != shape {
            return Err(LoadError::TensorShape {
                path: shard.path.clone(),
                tensor: tensor.to_owned(),
                found: info.shape.clone(),
                accepted: shape.to_vec(),
            });
        }
        let (start, end) = info.data_offsets;
        Ok((dtype, index, (shard.data + start, shard.data + end)))
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, LoadError> {
        let read = |source| LoadError::Read {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(read)?;
        let bytes = file.metadata().map_err(read)?.len();
        let damaged = |source| LoadError::Safetensors {
            path: path.clone(),
            bytes,
            source,
        };
        if bytes == 0 {
            // An empty mapping is an error of its own that says less.
            return Err(damaged(safetensors::SafeTensorError::HeaderTooSmall));
        }
        // SAFETY: read-only; the type's documentation asks that nobody changes the file.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(damaged)?;
        Ok(Self {
            data: header + size_of::<u64>(),
            path,
            map,
            metadata,
        })
    }
}
