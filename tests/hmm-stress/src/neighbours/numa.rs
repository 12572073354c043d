//! NUMA policies and the system calls that move pages between nodes.
//!
//! A device page is on no node. What moves pages between nodes leaves it alone, and it
//! comes home to where the policy wants it.

use std::fs;
use std::ops::Range;
use std::ptr;

use virtio_hmm_client::{Direction, Residency};

use crate::context::Context;
use crate::failure::Failure;
use crate::region::{PMD_PAGES, PageSize, Region};
use crate::require;

const PAGES: usize = 32;

/// Not in the libc crate.
const MPOL_MF_STRICT: libc::c_uint = 1 << 0;
const MPOL_MF_MOVE: libc::c_uint = 1 << 1;
const MPOL_F_NODE: libc::c_int = 1 << 0;
const MPOL_F_ADDR: libc::c_int = 1 << 1;

/// The size of node masks, of which the kernel takes one bit less.
const MASK_BITS: usize = 64;

/// The first and the last node that have memory.
pub(super) fn nodes() -> Result<[usize; 2], Failure> {
    let text = fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    let mut numbers = text.trim().split(['-', ',']).map(str::parse);
    match (numbers.next(), numbers.next_back()) {
        (Some(Ok(first)), Some(Ok(last))) => Ok([first, last]),
        _ => Err(Failure::Skip("the machine has one NUMA node".into())),
    }
}

/// The result of a system call that returns 0.
fn call(name: &'static str, result: libc::c_long) -> Result<(), Failure> {
    match result {
        0 => Ok(()),
        -1 => Err(Failure::system(name)),
        other => Err(Failure::Broken(format!("{name} gave {other}"))),
    }
}

/// Have pages of `range` come from `node`; with flags, move what is there already.
fn bind(range: Range<usize>, node: usize, flags: libc::c_uint) -> Result<(), Failure> {
    set_policy(range, libc::MPOL_BIND, node, flags)
}

/// Have pages of `range` come from `node` as long as it has free ones.
pub(super) fn prefer(range: Range<usize>, node: usize) -> Result<(), Failure> {
    set_policy(range, libc::MPOL_PREFERRED, node, 0)
}

fn set_policy(
    range: Range<usize>,
    mode: libc::c_int,
    node: usize,
    flags: libc::c_uint,
) -> Result<(), Failure> {
    let mask = 1u64 << node;
    // SAFETY: the mask lives for the call. Pages that move keep what they hold.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            range.start,
            range.len(),
            mode,
            &raw const mask,
            MASK_BITS,
            flags,
        )
    };
    call("mbind", result)
}

/// A policy of this thread, which is the default again when this is dropped.
struct ThreadPolicy;

impl ThreadPolicy {
    fn bind(node: usize) -> Result<Self, Failure> {
        let mask = 1u64 << node;
        // SAFETY: the mask lives for the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_set_mempolicy,
                libc::MPOL_BIND,
                &raw const mask,
                MASK_BITS,
            )
        };
        call("set_mempolicy", result)?;
        Ok(Self)
    }
}

impl Drop for ThreadPolicy {
    fn drop(&mut self) {
        // SAFETY: the default policy takes no mask. It is always allowed.
        unsafe {
            libc::syscall(
                libc::SYS_set_mempolicy,
                libc::MPOL_DEFAULT,
                ptr::null::<u64>(),
                0,
            )
        };
    }
}

/// What move_pages says of each of `pages`: its node or a negated errno. With a `node`,
/// it moves them there first.
fn place(
    region: &Region,
    pages: Range<usize>,
    node: Option<usize>,
) -> Result<Vec<libc::c_int>, Failure> {
    let addresses: Vec<usize> = pages.map(|page| region.range(page..page).start).collect();
    let mut status = vec![libc::c_int::MIN; addresses.len()];
    let nodes = node.map(|node| {
        let node = libc::c_int::try_from(node).unwrap_or(-1);
        vec![node; addresses.len()]
    });
    // SAFETY: all arrays have as many elements as is said. Pages keep what they hold.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            addresses.len(),
            addresses.as_ptr(),
            nodes.as_ref().map_or(ptr::null(), |nodes| nodes.as_ptr()),
            status.as_mut_ptr(),
            MPOL_MF_MOVE,
        )
    };
    call("move_pages", result)?;
    Ok(status)
}

/// Require that `pages` are in the RAM of `node`.
fn on_node(region: &Region, pages: Range<usize>, node: usize) -> Result<(), Failure> {
    let seen = place(region, pages.clone(), None)?;
    require!(
        seen.iter().all(|&seen| usize::try_from(seen) == Ok(node)),
        "pages {pages:?} should be on node {node}: {seen:?}"
    );
    Ok(())
}

/// Pages come home to the node of their policy, whatever brings them.
pub(super) fn policies(context: &Context) -> Result<(), Failure> {
    let nodes = nodes()?;
    let region = context.region(2 * PAGES, 0)?;
    region.fill_all(1);
    // One of the two is not where the pages were.
    for node in [nodes[1], nodes[0], nodes[1]] {
        context.settle(region.all(), Direction::ToDevice, 0)?;
        bind(region.all(), node, 0)?;
        context.expect(&region, 0..2 * PAGES, |_| Residency::Device)?;
        comes_home(context, &region, node)?;
    }
    drop(region);

    // Without a policy of the mapping that of the thread counts.
    let region = context.region(2 * PAGES, 1)?;
    region.fill_all(1);
    for node in nodes {
        context.settle(region.all(), Direction::ToDevice, 0)?;
        let _policy = ThreadPolicy::bind(node)?;
        comes_home(context, &region, node)?;
    }
    drop(region);
    large(context, nodes)
}

/// Half by touching it, the rest by request.
fn comes_home(context: &Context, region: &Region, node: usize) -> Result<(), Failure> {
    context.check(region, 0..PAGES, |_| 1)?;
    context.settle(region.all(), Direction::ToSystem, 0)?;
    on_node(region, 0..2 * PAGES, node)?;
    context.check(region, 0..2 * PAGES, |_| 1)
}

/// A huge page comes home to its node as well, as one or in parts.
fn large(context: &Context, nodes: [usize; 2]) -> Result<(), Failure> {
    let region = Region::new(PMD_PAGES, PageSize::Huge, context.region_seed(2))?;
    region.fill_all(1);
    for node in [nodes[1], nodes[0], nodes[1]] {
        bind(region.all(), node, 0)?;
        context.settle(region.all(), Direction::ToDevice, 0)?;
        context.expect(&region, 0..PMD_PAGES, |_| Residency::Device)?;
        region.touch(PMD_PAGES / 2);
        context.settle(region.all(), Direction::ToSystem, 0)?;
        on_node(&region, 0..PMD_PAGES, node)?;
        context.check(&region, 0..PMD_PAGES, |_| 1)?;
    }
    Ok(())
}

/// move_pages, mbind and migrate_pages move what is in RAM and leave device pages.
pub(super) fn moving(context: &Context) -> Result<(), Failure> {
    let nodes = nodes()?;
    let region = context.region(PAGES, 0)?;
    region.fill_all(1);
    let on_device = |page: usize| page.is_multiple_of(2);
    for page in (0..PAGES).filter(|&page| on_device(page)) {
        context.settle(region.range(page..page + 1), Direction::ToDevice, 0)?;
    }
    let says = |status: Vec<libc::c_int>, node: usize, call: &str| {
        for (page, seen) in status.into_iter().enumerate() {
            // folio_walk_start() finds only what is present: of a device page there is no node.
            let expected = if on_device(page) {
                -libc::ENOENT
            } else {
                libc::c_int::try_from(node).unwrap_or(-1)
            };
            require!(
                seen == expected,
                "{call} to node {node}: {seen} for page {page}, not {expected}"
            );
        }
        context.expect(&region, 0..PAGES, |page| {
            if on_device(page) {
                Residency::Device
            } else {
                Residency::Ram
            }
        })
    };
    for node in [nodes[1], nodes[0]] {
        says(place(&region, 0..PAGES, Some(node))?, node, "move_pages")?;
        says(place(&region, 0..PAGES, None)?, node, "move_pages before")?;
    }
    // queue_folios_pte_range() passes over device pages: even STRICT has no objection.
    for node in [nodes[1], nodes[0]] {
        bind(region.all(), node, MPOL_MF_MOVE | MPOL_MF_STRICT)?;
        says(place(&region, 0..PAGES, None)?, node, "mbind")?;
    }
    let masks = nodes.map(|node| 1u64 << node);
    // SAFETY: both masks live for the call. Pages that move keep what they hold.
    let left = unsafe {
        libc::syscall(
            libc::SYS_migrate_pages,
            0,
            MASK_BITS,
            &raw const masks[0],
            &raw const masks[1],
        )
    };
    if left < 0 {
        return Err(Failure::system("migrate_pages"));
    }
    says(place(&region, 0..PAGES, None)?, nodes[1], "migrate_pages")?;

    // Asking for the node of one page brings that page home.
    let mut node = -1;
    // SAFETY: the number lives for the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut node,
            ptr::null::<u64>(),
            0,
            region.all().start,
            MPOL_F_NODE | MPOL_F_ADDR,
        )
    };
    call("get_mempolicy", result)?;
    require!(
        usize::try_from(node) == Ok(nodes[0]),
        "get_mempolicy says {node}; the policy is node {}",
        nodes[0]
    );
    context.expect(&region, 0..1, |_| Residency::Ram)?;
    context.check(&region, 0..PAGES, |_| 1)
}
