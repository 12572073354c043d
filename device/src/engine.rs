//! The copy engine: moves bytes between device memory and slices of any other
//! memory. It knows nothing of virtio and of guests.
//!
//! All positions are byte offsets into device memory. Others may read and write
//! the same bytes at the same time; what such bytes end up as is unspecified,
//! and nothing else is touched.

use std::sync::Arc;

use vm_memory::{VolatileSlice, bitmap::BitmapSlice};

use crate::memory::{Error, Memory};

/// A copy engine over one [`Memory`].
#[derive(Clone, Debug)]
pub struct Engine {
    memory: Arc<Memory>,
}

impl Engine {
    /// An engine that works on `memory`.
    pub fn new(memory: Arc<Memory>) -> Self {
        Self { memory }
    }

    /// Memory that the engine works on.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Copies all of `from` to device memory at `to`.
    ///
    /// # Errors
    /// If the bytes do not all lie in device memory; nothing is copied then.
    pub fn to_device<B: BitmapSlice>(
        &self,
        to: u64,
        from: &VolatileSlice<'_, B>,
    ) -> Result<(), Error> {
        from.copy_to_volatile_slice(self.memory.slice(to, from.len())?);
        Ok(())
    }

    /// Copies device memory at `from` to all of `to`.
    ///
    /// # Errors
    /// If the bytes do not all lie in device memory; nothing is copied then.
    pub fn from_device<B: BitmapSlice>(
        &self,
        from: u64,
        to: VolatileSlice<'_, B>,
    ) -> Result<(), Error> {
        self.memory
            .slice(from, to.len())?
            .copy_to_volatile_slice(to);
        Ok(())
    }

    /// Sets `len` bytes of device memory at `to` to zero.
    ///
    /// # Errors
    /// If the bytes do not all lie in device memory; nothing is written then.
    pub fn fill(&self, to: u64, len: usize) -> Result<(), Error> {
        self.memory.fill(to, len)
    }

    /// Copies `len` bytes of device memory from `from` to `to`. If the two
    /// overlap, the source is read as it was before.
    ///
    /// # Errors
    /// If either range does not lie in device memory; nothing is copied then.
    pub fn device_to_device(&self, to: u64, from: u64, len: usize) -> Result<(), Error> {
        let to = self.memory.slice(to, len)?;
        self.memory.slice(from, len)?.copy_to_volatile_slice(to);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};
    use vm_memory::Bytes;

    use super::*;
    use crate::memory::Backing;

    const SIZE: usize = 2 << 20;
    /// Miri takes its time.
    const CASES: u32 = if cfg!(miri) { 4 } else { 64 };
    const LONGEST: usize = if cfg!(miri) { 100 } else { 8192 };

    #[derive(Clone, Debug)]
    enum Op {
        ToDevice { to: usize, bytes: Vec<u8> },
        FromDevice { from: usize, len: usize },
        Fill { to: usize, len: usize },
        DeviceToDevice { to: usize, from: usize, len: usize },
    }

    fn op() -> impl Strategy<Value = Op> {
        // Around the end of the memory now and then, so that ranges fall out.
        let at = || prop_oneof![0..LONGEST, SIZE - LONGEST..SIZE + LONGEST];
        let len = || 0..LONGEST;
        prop_oneof![
            (at(), vec(any::<u8>(), len())).prop_map(|(to, bytes)| Op::ToDevice { to, bytes }),
            (at(), len()).prop_map(|(from, len)| Op::FromDevice { from, len }),
            (at(), len()).prop_map(|(to, len)| Op::Fill { to, len }),
            (at(), at(), len()).prop_map(|(to, from, len)| Op::DeviceToDevice { to, from, len }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: CASES,
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// The engine does what the same operations do to a plain array, and
        /// refuses exactly the ranges that the array does not have.
        #[test]
        fn agrees_with_an_array(ops in vec(op(), 1..24)) {
            let engine = Engine::new(Arc::new(Memory::new(SIZE as u64, Backing::Sparse).unwrap()));
            let mut model = vec![0; SIZE];
            for op in ops {
                match op {
                    Op::ToDevice { to, mut bytes } => {
                        let inside = model.get_mut(to..to + bytes.len());
                        let expected = inside.map(|range| range.copy_from_slice(&bytes));
                        let slice = VolatileSlice::from(&mut bytes[..]);
                        let done = engine.to_device(to as u64, &slice);
                        prop_assert_eq!(done.is_ok(), expected.is_some());
                    }
                    Op::FromDevice { from, len } => {
                        let mut bytes = vec![0xee; len];
                        let done =
                            engine.from_device(from as u64, VolatileSlice::from(&mut bytes[..]));
                        match model.get(from..from + len) {
                            Some(expected) => prop_assert_eq!(&bytes[..], expected),
                            None => prop_assert!(bytes.iter().all(|b| *b == 0xee)),
                        }
                        prop_assert_eq!(done.is_ok(), from + len <= SIZE);
                    }
                    Op::Fill { to, len } => {
                        let expected = model.get_mut(to..to + len).map(|range| range.fill(0));
                        prop_assert_eq!(engine.fill(to as u64, len).is_ok(), expected.is_some());
                    }
                    Op::DeviceToDevice { to, from, len } => {
                        let inside = to + len <= SIZE && from + len <= SIZE;
                        if inside {
                            model.copy_within(from..from + len, to);
                        }
                        let done = engine.device_to_device(to as u64, from as u64, len);
                        prop_assert_eq!(done.is_ok(), inside);
                    }
                }
            }
            let mut memory = vec![0; SIZE];
            engine.memory().slice(0, SIZE).unwrap().read_slice(&mut memory, 0).unwrap();
            prop_assert!(memory == model);
        }
    }
}
