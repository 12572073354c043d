//! What `hmm-hold` writes into its pages, for tests that look for it on the host.

/// Bytes of [`HELD`], which divides a page.
pub const WORD: usize = 16;
/// What every page is full of.
pub const HELD: &[u8; WORD] = b"pages of a guest";
