//! Everything that has to be there before a machine can start.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use hmm_init::{Driver, Order};

use crate::accelerator::{Accelerator, Choice, kvm_failure};
use crate::apt::MIRROR_VARIABLE;
use crate::boot_image;
use crate::build::{self, Programs};
use crate::daemon::Sockets;
use crate::devices::own_sockets;
use crate::error::{EXIT_TIMEOUT, Error, FileContext, Result};
use crate::initramfs::{Contents, MODULE_PATH, guest_path};
use crate::kernel::{self, KERNEL_VARIABLE, Kernel};
use crate::machine::Machine;
use crate::named_kernel::NamedKernel;
use crate::paths::{self, Cache, remove_all};
use crate::process::shell_line;
use crate::profile::{self, Profile, read_toml};
use crate::report::Report;
use crate::root::{Recipe, Root};
use crate::run::{DeviceAt, Finished, Limits, Run, run_files, scratch_directory};
use crate::sampler::Sampler;
use crate::terminal;
use crate::toolbox::{self, TOOLBOX_VARIABLE, Toolbox};
use crate::units::{Size, parse_duration};

/// Variable that sets what the machine runs on, as `--accel` does.
pub const ACCELERATOR_VARIABLE: &str = "VIRTIO_HMM_ACCEL";
/// How long a guest may give no sign of life, if the user does not say.
const SILENCE: Duration = Duration::from_secs(60);
/// Runs whose logs are kept.
const KEPT_LOGS: usize = 50;
/// The probe guest does nothing but boot.
const PROBE: Duration = Duration::from_secs(10);

/// What the user can say about what machines run on and boot.
#[derive(Args, Clone, Debug, Default)]
pub struct Platform {
    /// What the machine runs on
    #[arg(long, value_enum, default_value_t = Choice::Auto, env = ACCELERATOR_VARIABLE)]
    pub accel: Choice,
    /// The guest's kernel: stock, debug (with the kernel's own checks), another name of images/kernels.toml, or the path of a build tree
    #[arg(long, value_name = "KERNEL", default_value = "stock", env = KERNEL_VARIABLE)]
    pub kernel: kernel::Choice,
    /// Where QEMU, the stock kernel and the compiler come from
    #[arg(long, value_enum, default_value_t = toolbox::Choice::Auto, env = TOOLBOX_VARIABLE)]
    pub toolbox: toolbox::Choice,
    /// Debian mirror for the toolbox, instead of the one this machine's apt uses
    #[arg(long, value_name = "URL", env = MIRROR_VARIABLE)]
    pub mirror: Option<String>,
}

/// What the user can say about the machine.
#[derive(Args, Clone, Debug, Default)]
pub struct MachineOptions {
    /// Machine profile: a name in qemu-configs/, or the path of a TOML file [default: bench for bench, default for all else]
    #[arg(long, value_name = "NAME")]
    pub profile: Option<String>,
    /// What it runs on and boots
    #[command(flatten)]
    pub platform: Platform,
    /// Virtual CPUs
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// Guest memory, such as 1G
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,
    /// Devices, each with a daemon and memory of its own
    #[arg(long, value_name = "N", conflicts_with_all = ["no_device", "device_socket"])]
    pub devices: Option<u32>,
    /// Memory of each device, such as 256M
    #[arg(long, value_name = "SIZE")]
    pub device_memory: Option<Size>,
    /// Copy queues of the device
    #[arg(long, value_name = "N")]
    pub copy_queues: Option<u32>,
    /// Boot the kernel's image, which unpacks itself in the guest: only so can that sleep (suspend to RAM)
    #[arg(long)]
    pub bzimage: bool,
    /// Add a word to the kernel's command line, such as init_on_alloc=0; can be repeated
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    pub append: Vec<String>,
    /// Build the driver from this directory instead of this checkout's guest-driver/
    #[arg(long, value_name = "DIR")]
    pub driver: Option<PathBuf>,
    /// Boot without the device and its driver
    #[arg(long, conflicts_with = "device_socket")]
    pub no_device: bool,
    /// Use the device daemon at this vhost-user socket instead of starting one
    #[arg(long, value_name = "SOCKET", requires = "control_socket")]
    pub device_socket: Option<PathBuf>,
    /// Control socket of that daemon
    #[arg(long, value_name = "SOCKET", requires = "device_socket")]
    pub control_socket: Option<PathBuf>,
    /// Bytes a second that copies take each way, such as 2G
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["device_socket", "no_device"])]
    pub bandwidth: Option<Size>,
    /// Time that each copy takes besides, such as 10us
    #[arg(long, value_name = "TIME", conflicts_with_all = ["device_socket", "no_device"])]
    pub latency: Option<String>,
    /// Let the device go wrong on purpose, see docs/fault-injection.md; can be repeated
    #[arg(long, value_name = "RULE", conflicts_with_all = ["device_socket", "no_device"])]
    pub inject: Vec<String>,
    /// Repeat the faults of an earlier run: the seed is in the daemon's log
    #[arg(long, value_name = "N", requires = "inject")]
    pub inject_seed: Option<u64>,
    /// Go on when the device daemon dies: the guest then sees a dead device
    #[arg(long)]
    pub device_may_die: bool,
    /// End the run after this time, such as 90s or 10m [default: 10m; more for stress, bench and torture; none for run --gdb and boot on a terminal]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// End the run when the guest gives no sign of life for this time, but not with run --gdb or boot on a terminal [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub silence: Option<Duration>,
    /// Start stopped, and let a debugger attach to the guest's kernel
    #[arg(long)]
    pub gdb: bool,
    /// Print the daemon's and QEMU's command lines and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

impl From<Platform> for MachineOptions {
    fn from(platform: Platform) -> Self {
        Self {
            platform,
            ..Self::default()
        }
    }
}

impl MachineOptions {
    /// The profile, with what the command line changes.
    ///
    /// # Errors
    /// There is no such profile, or a value cannot work.
    pub fn profile(&self) -> Result<Profile> {
        let mut profile = profile::load(self.profile.as_deref().unwrap_or("default"))?;
        profile.cpus = self.cpus.unwrap_or(profile.cpus);
        profile.memory = self.memory.unwrap_or(profile.memory);
        profile.device.count = match self.device_socket {
            Some(_) => 1,
            None => self.devices.unwrap_or(profile.device.count),
        };
        profile.device.memory = self.device_memory.unwrap_or(profile.device.memory);
        profile.device.copy_queues = self.copy_queues.unwrap_or(profile.device.copy_queues);
        profile.device.bandwidth = self.bandwidth.or(profile.device.bandwidth);
        profile.device.latency = self.latency.clone().or(profile.device.latency);
        profile.device.inject.extend(self.inject.iter().cloned());
        profile.device.inject_seed = self.inject_seed.or(profile.device.inject_seed);
        let words = &mut profile.kernel.command_line;
        words.extend(self.append.iter().cloned());
        profile.check().map_err(Error::Profile)?;
        Ok(profile)
    }
}

/// What runs in the guest.
#[derive(Clone, Debug, Default)]
pub struct Job {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Files of the user's.
    pub files: Vec<PathBuf>,
    /// Debian packages that go into the guest with what they depend on.
    pub packages: Vec<String>,
    /// Variables of the user's.
    pub environment: BTreeMap<String, String>,
    /// Run it on the console, for a person.
    pub interactive: bool,
    /// Give it this process's standard input.
    pub forward_input: bool,
    /// Unload the driver when it has ended.
    pub unload: bool,
    /// Have `hmm-top` show the devices meanwhile, on the terminal.
    pub top: bool,
    /// Watch the devices meanwhile.
    pub sampler: Option<Sampler>,
}

/// Everything is there; a machine can start.
#[derive(Debug)]
pub struct Prepared {
    options: MachineOptions,
    profile: Profile,
    cache: Cache,
    toolbox: Toolbox,
    kernel: Kernel,
    boot_image: PathBuf,
    programs: Programs,
    module: Option<PathBuf>,
    accelerator: Accelerator,
}

impl Prepared {
    /// Makes what is missing, and says so.
    ///
    /// # Errors
    /// Something cannot be made.
    pub fn new(options: &MachineOptions) -> Result<Self> {
        let report = Report;
        let profile = options.profile()?;
        let cache = Cache::locate()?;
        let toolbox = Toolbox::place(options.platform.toolbox, &cache)?;
        let programs = Programs::locate()?;
        programs.build()?;
        let mirror = options.platform.mirror.as_deref();
        toolbox.make(&cache, mirror, report)?;
        let kernel = match &options.platform.kernel {
            kernel::Choice::Stock => toolbox.kernel()?,
            kernel::Choice::Named(name) => {
                NamedKernel::find(name, &cache)?.make(&cache, mirror, report)?
            }
            kernel::Choice::Tree(tree) => Kernel::of_tree(tree)?,
        };
        let module = if options.no_device || !profile.driver.load {
            None
        } else {
            let own = build::module_sources();
            let sources = options.driver.as_deref().unwrap_or(&own);
            Some(build::module(sources, &kernel, &cache, report)?)
        };
        let boot_image = if options.bzimage {
            kernel.image.clone()
        } else {
            boot_image::make(&kernel.image, &cache, report)?
        };
        let mut prepared = Self {
            options: options.clone(),
            profile,
            cache,
            toolbox,
            kernel,
            boot_image,
            programs,
            module,
            accelerator: Accelerator::Tcg,
        };
        if options.platform.accel != Choice::Tcg {
            prepared.accelerator = prepared.choose_accelerator(report)?;
        }
        Ok(prepared)
    }

    /// What the machine runs on.
    #[must_use]
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// The machine's profile, with what the command line changed.
    #[must_use]
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Where QEMU comes from.
    #[must_use]
    pub fn toolbox(&self) -> &Toolbox {
        &self.toolbox
    }

    /// The kernel's own `test_hmm`, for the kernel that boots.
    ///
    /// # Errors
    /// Its source cannot be fetched, or it does not build.
    pub fn test_hmm(&self) -> Result<PathBuf> {
        let mirror = self.options.platform.mirror.as_deref();
        build::test_hmm(&self.kernel, &self.cache, mirror, Report)
    }

    /// The kernel that boots.
    #[must_use]
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    fn choose_accelerator(&self, report: Report) -> Result<Accelerator> {
        let probe = || {
            report
                .line("trying whether a guest runs on KVM here (once for each boot of this host)");
            self.probe()
        };
        match kvm_failure(&self.cache, &self.toolbox.identity(), probe)? {
            None => Ok(Accelerator::Kvm),
            Some(reason) if self.options.platform.accel == Choice::Kvm => Err(Error::NoKvm(reason)),
            Some(reason) => {
                report.line(&format!("using TCG: {reason}"));
                Ok(Accelerator::Tcg)
            }
        }
    }

    fn probe(&self) -> Result<()> {
        let job = Job {
            command: vec!["true".into()],
            ..Job::default()
        };
        let limits = Limits {
            total: Some(PROBE),
            silence: PROBE,
            device_may_die: false,
        };
        let mut quiet = |_, _: &[u8]| Ok(());
        self.start(
            Accelerator::Kvm,
            &job,
            DeviceAt::Nowhere,
            limits,
            &mut quiet,
        )
        .map(drop)
        .map_err(|error| match error.exit_status() {
            EXIT_TIMEOUT => Error::Config(format!("it did not boot within {} s", PROBE.as_secs())),
            _ => error,
        })
    }

    /// Boots a machine, runs the job in it and hands on its output.
    ///
    /// # Errors
    /// Anything but the command's own end; the log's tail has been shown then.
    pub fn run(
        &self,
        job: &Job,
        output: &mut dyn FnMut(hmm_init::Stream, &[u8]) -> io::Result<()>,
    ) -> Result<Finished> {
        let unlimited = job.interactive || self.options.gdb;
        let limits = Limits {
            total: self
                .options
                .timeout
                .or((!unlimited).then_some(Duration::from_secs(600))),
            silence: if unlimited {
                Duration::MAX
            } else {
                self.options.silence.unwrap_or(SILENCE)
            },
            device_may_die: self.options.device_may_die,
        };
        let device = match (&self.options.device_socket, &self.options.control_socket) {
            (Some(device), Some(control)) => DeviceAt::Others(Sockets {
                device: device.clone(),
                control: control.clone(),
            }),
            _ if self.options.no_device => DeviceAt::Nowhere,
            _ => DeviceAt::Own(self.programs.daemon()),
        };
        match self.start(self.accelerator, job, device.clone(), limits, output) {
            // Under TCG about one boot of fifty dies of an int3 that the kernel put into
            // its own code and took out again; nothing of ours has run by then.
            Err(Error::Run { logs, cause })
                if self.accelerator == Accelerator::Tcg && matches!(*cause, Error::Boot(_)) =>
            {
                Report.line(&format!(
                    "{cause}; trying once more (its log: {})",
                    logs.display()
                ));
                self.start(self.accelerator, job, device, limits, output)
            }
            ended => ended,
        }
    }

    fn start(
        &self,
        accelerator: Accelerator,
        job: &Job,
        device: DeviceAt,
        limits: Limits,
        output: &mut dyn FnMut(hmm_init::Stream, &[u8]) -> io::Result<()>,
    ) -> Result<Finished> {
        let packages = self.packages(&job.packages)?;
        let top = job.top.then(|| self.programs.build_top()).transpose()?;
        let scratch = scratch_directory()?;
        let logs = self.new_log_directory()?;
        let driver = self.profile.driver.load && !matches!(device, DeviceAt::Nowhere);
        let names: Vec<&str> = self
            .profile
            .kernel
            .modules
            .iter()
            .map(String::as_str)
            .collect();
        let modules = self.kernel.module_files(&names);
        let order = Order {
            command: job.command.clone(),
            environment: job.environment.clone(),
            modules: modules.iter().map(|module| guest_path(module)).collect(),
            driver: driver.then(|| Driver {
                path: MODULE_PATH.into(),
                parameters: self.profile.driver.parameters.clone(),
                nodes: (0..self.profile.device.count)
                    .map(|number| format!("/dev/hmm{number}"))
                    .collect(),
                unload: job.unload,
            }),
            terminal: job.interactive.then(terminal::size),
        };
        let files = run_files(scratch.path(), &logs);
        let contents = Contents {
            programs: &self.programs,
            busybox: &self.toolbox.busybox(),
            module: self.module.as_deref().filter(|_| driver),
            kernel_modules: &modules,
            packages: packages.as_ref().map(Root::path),
            files: &job.files,
            order: &order,
        };
        contents.write(&files.initramfs)?;
        let run = Run {
            machine: Machine {
                toolbox: &self.toolbox,
                kernel: &self.boot_image,
                profile: &self.profile,
                accelerator,
                devices: Vec::new(),
                interactive: job.interactive,
                gdb: self.options.gdb,
            },
            device,
            limits,
            logs: &logs,
            forward_input: job.forward_input,
            top,
            sampler: job.sampler.as_ref(),
        };
        run.go(scratch.path(), output).map_err(|error| Error::Run {
            logs,
            cause: Box::new(error),
        })
    }

    /// A root directory with these Debian packages, if there are any.
    fn packages(&self, packages: &[String]) -> Result<Option<Root>> {
        if packages.is_empty() {
            return Ok(None);
        }
        let mut recipe: Recipe = read_toml(&paths::checkout().join("images/packages.toml"))?;
        recipe.packages.extend_from_slice(packages);
        let what = format!("the guest's packages ({})", packages.join(", "));
        let root = Root::place(&what, recipe, &self.cache);
        root.make(&self.cache, self.options.platform.mirror.as_deref(), Report)?;
        Ok(Some(root))
    }

    fn new_log_directory(&self) -> Result<PathBuf> {
        let all = self.cache.logs();
        fs::create_dir_all(&all).at("create", &all)?;
        let mut old: Vec<PathBuf> = fs::read_dir(&all)
            .at("read", &all)?
            .flatten()
            .map(|entry| entry.path())
            .collect();
        old.sort();
        for path in old.iter().rev().skip(KEPT_LOGS - 1) {
            remove_all(path)?;
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let path = all.join(format!("{}-{}", now.as_millis(), std::process::id()));
        fs::create_dir(&path).at("create", &path)?;
        Ok(path)
    }
}

/// The command lines of a run, without making or starting anything.
///
/// # Errors
/// The profile is wrong, or there is no toolbox yet.
pub fn dry_run(options: &MachineOptions, interactive: bool) -> Result<String> {
    let profile = options.profile()?;
    let cache = Cache::locate()?;
    let toolbox = Toolbox::place(options.platform.toolbox, &cache)?;
    let missing = |what| {
        Err(Error::Config(format!(
            "there is no {what} yet; the same command without --dry-run makes it"
        )))
    };
    if !toolbox.is_made() {
        return missing("toolbox");
    }
    let kernel = match &options.platform.kernel {
        kernel::Choice::Stock => toolbox.kernel()?,
        kernel::Choice::Named(name) => match NamedKernel::find(name, &cache)?.made()? {
            Some(kernel) => kernel,
            None => return missing("such kernel"),
        },
        kernel::Choice::Tree(tree) => Kernel::of_tree(tree)?,
    };
    let scratch = std::env::temp_dir().join("virtio-hmm-XXXXXX");
    let logs = cache.logs().join("XXXXXX");
    let mut text = String::new();
    let mut devices = Vec::new();
    if let Some(socket) = &options.device_socket {
        devices.push(socket.clone());
    } else if !options.no_device {
        let daemon = Programs::locate()?.daemon();
        for slot in 0..profile.device.count {
            let sockets = own_sockets(&scratch, slot);
            let command = crate::daemon::command(&daemon, &profile.device, &sockets);
            text += &(shell_line(&command) + "\n");
            devices.push(sockets.device);
        }
    }
    let kvm = matches!(
        crate::accelerator::remembered_kvm(&cache, &toolbox.identity()),
        Some(None)
    );
    let unpacked = (!options.bzimage).then(|| boot_image::made(&kernel.image, &cache));
    let image = unpacked.flatten().unwrap_or(kernel.image);
    let machine = Machine {
        toolbox: &toolbox,
        kernel: &image,
        profile: &profile,
        accelerator: match options.platform.accel {
            Choice::Kvm => Accelerator::Kvm,
            Choice::Auto if kvm => Accelerator::Kvm,
            Choice::Auto | Choice::Tcg => Accelerator::Tcg,
        },
        devices,
        interactive,
        gdb: options.gdb,
    };
    text += &shell_line(&machine.command(&run_files(&scratch, &logs)));
    text.push('\n');
    Ok(text)
}

/// The end of the guest's log, and where the rest is.
#[must_use]
pub fn log_tail(logs: &Path) -> String {
    let path = logs.join("console.log");
    let bytes = fs::read(&path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).replace('\r', "");
    if text.is_empty() {
        return format!(
            "(the guest's log is empty; the others are in {})",
            logs.display()
        );
    }
    format!(
        "{}\n(all of it: {})",
        crate::process::tail(&text, 40),
        path.display()
    )
}
