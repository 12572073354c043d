//! KSM: pages of the same contents become one.
//!
//! KSM finds merged pages by their frames, and reads them. So nothing that it may merge
//! goes to the device; device pages it passes by.

use std::path::Path;

use virtio_hmm_client::{Direction, Residency, Skip};

use super::counted::counted;
use super::tunable::{Tunable, number, wait_until};
use crate::context::Context;
use crate::failure::Failure;
use crate::pagemap;
use crate::region::Region;
use crate::require;

/// Pages of each region.
const PAGES: usize = 128;

const SCANS: &str = "/sys/kernel/mm/ksm/full_scans";
const MERGED: &str = "/sys/kernel/mm/ksm/pages_sharing";
const ZERO: &str = "/sys/kernel/mm/ksm/ksm_zero_pages";

/// KSM at work.
struct Ksm {
    run: Tunable,
    _tunables: Vec<Tunable>,
}

/// It takes apart what it merged, and ends.
impl Drop for Ksm {
    fn drop(&mut self) {
        // A test that fails because of it tells.
        let _ = self.run.write("2");
    }
}

impl Ksm {
    fn start(use_zero_pages: bool) -> Result<Self, Failure> {
        let directory = Path::new("/sys/kernel/mm/ksm");
        if !directory.exists() {
            return Err(Failure::Skip("the kernel has no KSM".into()));
        }
        let use_zero_pages = if use_zero_pages { "1" } else { "0" };
        let tunables = [
            ("use_zero_pages", use_zero_pages),
            // Look at each page in each scan.
            ("smart_scan", "0"),
            ("pages_to_scan", "10000"),
            ("sleep_millisecs", "1"),
        ]
        .into_iter()
        .map(|(name, value)| Tunable::set(directory.join(name), value))
        .collect::<Result<_, _>>()?;
        let run = Tunable::set(directory.join("run"), "1")?;
        Ok(Self {
            run,
            _tunables: tunables,
        })
    }

    /// Let KSM look at every page twice, as it does before it merges.
    fn scan(&self) -> Result<(), Failure> {
        let before = number(SCANS)?;
        wait_until("KSM scans", || Ok(number(SCANS)? >= before + 3))
    }
}

/// Two regions of the same contents, all of it merged.
fn merged_regions(context: &Context, ksm: &Ksm) -> Result<[Region; 2], Failure> {
    let regions = [context.region(PAGES, 0)?, context.region(PAGES, 0)?];
    for region in &regions {
        region.fill_all(1);
        region.advise(0..PAGES, libc::MADV_MERGEABLE)?;
    }
    ksm.scan()?;
    require!(
        number(MERGED)? == PAGES as i64 && pairs(&regions)? == PAGES,
        "{} pages are merged, {PAGES} should be",
        number(MERGED)?
    );
    Ok(regions)
}

/// How many pages of the regions are the same.
fn pairs([left, right]: &[Region; 2]) -> Result<usize, Failure> {
    let left = pagemap::entries(left.all())?;
    let right = pagemap::entries(right.all())?;
    let same = left
        .iter()
        .zip(&right)
        .filter(|(left, right)| left.present() && right.present() && left.frame() == right.frame());
    Ok(same.count())
}

/// Require that nothing of the region goes to the device.
fn stays(context: &Context, region: &Region) -> Result<(), Failure> {
    let before = context.device.query(region.all())?;
    counted(
        context,
        &[
            ("skipped_unsupported", PAGES),
            ("to_device_frames", 0),
            ("fill_frames", 0),
        ],
        || {
            let outcome = context.migrate(region.all(), Direction::ToDevice)?;
            require!(
                outcome.skipped(Skip::Unsupported) == PAGES as u64,
                "pages that KSM may merge: {outcome:?}"
            );
            Ok(())
        },
    )?;
    require!(
        context.device.query(region.all())? == before,
        "pages that KSM may merge are elsewhere"
    );
    Ok(())
}

/// Require that all of the region goes to the device.
fn goes(context: &Context, region: &Region) -> Result<(), Failure> {
    counted(context, &[("pages_to_device", PAGES)], || {
        context.settle(region.all(), Direction::ToDevice, 0)
    })?;
    context.expect(region, 0..PAGES, |_| Residency::Device)
}

pub(super) fn merged(context: &Context) -> Result<(), Failure> {
    let ksm = Ksm::start(false)?;
    let regions = merged_regions(context, &ksm)?;
    let [left, right] = &regions;
    stays(context, left)?;
    ksm.scan()?;
    require!(pairs(&regions)? == PAGES, "merged pages were taken apart");

    // A write makes a page the process's own, but KSM may merge it at any time.
    let written = |page: usize| page.is_multiple_of(2);
    (0..PAGES)
        .filter(|&page| written(page))
        .for_each(|page| left.fill(page, 2));
    stays(context, left)?;
    let generation = |page| if written(page) { 2 } else { 1 };
    context.check(left, 0..PAGES, generation)?;
    context.check(right, 0..PAGES, |_| 1)?;

    // One region asks for its pages back, the other gets them back when KSM ends.
    left.advise(0..PAGES, libc::MADV_UNMERGEABLE)?;
    goes(context, left)?;
    ksm.scan()?;
    stays(context, right)?;
    drop(ksm);
    require!(number(MERGED)? == 0, "pages are still merged");
    right.advise(0..PAGES, libc::MADV_UNMERGEABLE)?;
    goes(context, right)?;
    context.check(left, 0..PAGES, generation)?;
    context.check(right, 0..PAGES, |_| 1)
}

/// get_mergeable_page() and scan_get_next_rmap_item() pass device pages by.
pub(super) fn on_device(context: &Context) -> Result<(), Failure> {
    let ksm = Ksm::start(false)?;
    let regions = [context.region(PAGES, 0)?, context.region(PAGES, 0)?];
    let [left, right] = &regions;
    for region in &regions {
        region.fill_all(1);
        context.settle(region.all(), Direction::ToDevice, 0)?;
        region.advise(0..PAGES, libc::MADV_MERGEABLE)?;
    }
    counted(context, &[("cpu_faults", 0)], || {
        ksm.scan()?;
        context.expect(left, 0..PAGES, |_| Residency::Device)?;
        context.expect(right, 0..PAGES, |_| Residency::Device)
    })?;
    // One of each pair comes home: there is still nothing to merge it with.
    counted(context, &[("pages_faulted", PAGES)], || {
        context.check(left, 0..PAGES, |_| 1)?;
        ksm.scan()
    })?;
    require!(number(MERGED)? == 0, "KSM merged device pages");
    context.check(right, 0..PAGES, |_| 1)?;
    ksm.scan()?;
    require!(pairs(&regions)? == PAGES, "pages at home are not merged");
    context.check(left, 0..PAGES, |_| 1)?;
    context.check(right, 0..PAGES, |_| 1)
}

pub(super) fn zero(context: &Context) -> Result<(), Failure> {
    let ksm = Ksm::start(true)?;
    let region = context.region(PAGES, 0)?;
    // Every other page is written with zeros.
    let zero = |page: usize| page.is_multiple_of(2);
    let generation = |page| if zero(page) { 0 } else { 1 };
    (0..PAGES).for_each(|page| region.fill(page, generation(page)));
    region.advise(0..PAGES, libc::MADV_MERGEABLE)?;
    ksm.scan()?;
    context.expect(&region, 0..PAGES, |page| {
        if zero(page) {
            Residency::Zero
        } else {
            Residency::Ram
        }
    })?;
    require!(
        number(ZERO)? == PAGES as i64 / 2,
        "KSM made {} zero pages",
        number(ZERO)?
    );

    stays(context, &region)?;
    require!(number(ZERO)? == PAGES as i64 / 2, "KSM lost zero pages");
    region.advise(0..PAGES, libc::MADV_UNMERGEABLE)?;
    require!(number(ZERO)? == 0, "{} zero pages are left", number(ZERO)?);
    goes(context, &region)?;
    context.check(&region, 0..PAGES, generation)
}
