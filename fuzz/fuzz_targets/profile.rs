//! A machine profile of any contents is refused or makes sense.
#![no_main]

use hmm_profile::{Error, Profile, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let profile: Profile = match parse(text) {
        Ok(profile) => profile,
        Err(Error::Syntax { line, message }) => {
            let lines = text.matches('\n').count() + 1;
            assert!((1..=lines).contains(&line), "{line}: {message}");
            return;
        }
        Err(e) => panic!("{e}"),
    };
    // As they are shown and handed on, sizes are the same.
    for size in [profile.memory, profile.device.memory] {
        assert_eq!(size.to_string().parse(), Ok(size));
    }
    if profile.check().is_ok() {
        let nodes = profile.nodes;
        assert!(nodes > 0 && profile.cpus >= nodes);
        assert!(profile.memory.0 / u64::from(nodes) > 0);
        let device = &profile.device;
        // Numbers of devices and queues of which QEMU and the daemon know.
        assert!(device.count > 0 && device.copy_queues > 0);
        assert!(u16::try_from(device.queue_size).is_ok_and(u16::is_power_of_two));
    }
});
