//! The Grafana dashboard asks for metrics and labels that there are.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    sync::Arc,
    time::Duration,
};

use promql_parser::{
    label::Labels,
    parser::{self, AggregateExpr, Expr, LabelModifier, VectorSelector},
    util::{ExprVisitor, walk_expr},
};
use serde_json::Value;
use vhost_device_hmm::{
    abi::VIRTIO_HMM_S_OK,
    counters::{Completed, Timed},
    hardware::Events,
    memory::{Backing, Memory},
    metrics::Metrics,
    request::Operation,
    session::Shared,
};

/// Families that no panel shows: frames are bytes by another name, and the
/// generation changes with the session.
const UNUSED: [&str; 2] = ["hmm_frames", "hmm_generation"];

/// Labels that Prometheus adds.
const ADDED: [&str; 1] = ["instance"];

/// The metrics, with their labels if there is a sample, and the families.
fn served() -> (BTreeMap<String, BTreeSet<String>>, BTreeSet<String>) {
    let shared = Arc::new(Shared::new(2 << 20, 1, Events::default()));
    let timed = Timed {
        wait: Duration::ZERO,
        copy: Duration::ZERO,
        weight: 1,
    };
    let completed = Completed {
        operation: Operation::ToDevice,
        frames: 1,
        done: 1,
        status: VIRTIO_HMM_S_OK,
        timed: Some(timed),
    };
    shared.begin().counters.queues()[2].record(&completed);
    let memory = Arc::new(Memory::new(2 << 20, Backing::Sparse).unwrap());
    let text = Metrics::new(shared, memory).encode().unwrap();
    let (mut metrics, mut families) = (BTreeMap::<_, BTreeSet<_>>::new(), BTreeSet::new());
    for line in text.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let (family, kind) = family.split_once(' ').unwrap();
            families.insert(family.to_owned());
            // Those of the processor have no sample where it counts nothing.
            if family.starts_with("hmm_worker_") {
                assert_eq!(kind, "counter");
                metrics.insert(format!("{family}_total"), ["queue".to_owned()].into());
            }
        } else if !line.starts_with('#') {
            let Ok(Expr::VectorSelector(sample)) = parser::parse(line.rsplit_once(' ').unwrap().0)
            else {
                panic!("{line}");
            };
            let labels = sample.matchers.matchers.into_iter().map(|label| label.name);
            metrics
                .entry(sample.name.unwrap())
                .or_default()
                .extend(labels);
        }
    }
    (metrics, families)
}

/// The metrics and labels of an expression: those that it selects, and those
/// by which it groups.
#[derive(Default)]
struct Asked {
    metrics: BTreeSet<String>,
    labels: BTreeSet<String>,
}

impl Asked {
    fn select(&mut self, selector: &VectorSelector) {
        self.metrics.extend(selector.name.clone());
        let labels = selector
            .matchers
            .matchers
            .iter()
            .map(|label| label.name.clone());
        self.labels.extend(labels);
    }
}

impl ExprVisitor for Asked {
    type Error = ();

    fn pre_visit(&mut self, expression: &Expr) -> Result<bool, ()> {
        match expression {
            Expr::VectorSelector(selector) => self.select(selector),
            Expr::MatrixSelector(selector) => self.select(&selector.vs),
            Expr::Aggregate(AggregateExpr {
                modifier:
                    Some(
                        LabelModifier::Include(Labels { labels })
                        | LabelModifier::Exclude(Labels { labels }),
                    ),
                ..
            }) => self.labels.extend(labels.iter().cloned()),
            _ => {}
        }
        Ok(true)
    }
}

#[test]
fn the_dashboard_matches_the_metrics() {
    let page = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../docs/grafana-dashboard.json"
    );
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(page).unwrap()).unwrap();
    let (metrics, families) = served();
    let mut shown = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = &panel["title"];
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{title}");
        for target in targets {
            let text = target["expr"].as_str().unwrap();
            let expression = parser::parse(&text.replace("$__rate_interval", "1m"));
            let expression = expression.unwrap_or_else(|e| panic!("{title}: {text}: {e}"));
            let mut asked = Asked::default();
            walk_expr(&mut asked, &expression).unwrap();
            assert!(!asked.metrics.is_empty(), "{title}: {text}");
            let mut labels: BTreeSet<_> = ADDED.map(str::to_owned).into();
            for metric in &asked.metrics {
                let known = metrics.get(metric);
                labels.extend(
                    known
                        .unwrap_or_else(|| panic!("{title}: no {metric}"))
                        .clone(),
                );
            }
            // The legend names labels too.
            let legend = target["legendFormat"].as_str().unwrap();
            let named = legend
                .split("{{")
                .skip(1)
                .filter_map(|part| part.split_once("}}"));
            let named = named.map(|(label, _)| label.to_owned());
            asked.labels.extend(named);
            for label in &asked.labels {
                assert!(
                    labels.contains(label),
                    "{title}: no label {label} in {text}"
                );
            }
            shown.extend(asked.metrics);
        }
    }
    for family in &families {
        let parts = ["", "_total", "_bucket"].map(|suffix| format!("{family}{suffix}"));
        let used = parts.iter().any(|metric| shown.contains(metric));
        let unused = UNUSED.contains(&family.as_str());
        assert_ne!(used, unused, "{family} has to be shown or listed as unused");
    }
    assert!(UNUSED.iter().all(|unused| families.contains(*unused)));
}
