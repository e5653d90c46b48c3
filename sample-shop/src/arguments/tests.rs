use clap::CommandFactory;

use super::*;

fn parse(line: &str) -> Result<Command, String> {
    let words = ["sample-shop"].into_iter().chain(line.split_whitespace());
    Arguments::read(words).map(|arguments| arguments.command).map_err(|error| error.to_string())
}

fn run(line: &str) -> Run {
    match parse(line) {
        Ok(Command::Run(run)) => run,
        other => panic!("{line}: {other:?}"),
    }
}

/// Asserts that the command line is refused with a message that contains all of `parts`.
fn refused(line: &str, parts: &[&str]) {
    let message = parse(line).map(|command| format!("{command:?}")).expect_err(line);
    for part in parts {
        assert!(message.contains(part), "{line}: {message}");
    }
}

#[test]
fn command_line_definition_is_valid() {
    Arguments::command().debug_assert();
}

#[test]
fn run_with_no_argument_generates_orders_into_a_file() {
    let run = run("run");
    assert_eq!(run.connection.store, StoreUrl::Sqlite("shop.db".into()));
    assert_eq!(run.connection.bus, BusUrl::Local);
    assert_eq!((run.concurrency, run.stock_factor, run.seed), (512, StockFactor::ONE, 7));
    assert_eq!((run.decline_rate(), run.cancel_rate()), (0.1, 0.02));
    assert_eq!((run.output.json, run.output.quiet), (false, false));
    let source = run.source().expect("generated");
    assert_eq!(source.len(), 2_000);
    let first = source.invoices().expect("generated").next().expect("one").expect("sound");
    assert_eq!(first.id(), "g7-000001");
}

#[test]
fn run_takes_every_argument() {
    let run =
        run("run --generate 50 --store memory: --bus kafka://a:9092,[::1]:9093 --concurrency 8 --stock-factor 0.9 \
                   --decline-rate 0 --cancel-rate 1 --seed 42 --json --quiet");
    assert_eq!(run.connection.store, StoreUrl::Memory);
    assert_eq!(run.connection.bus, BusUrl::Kafka(annals_kafka::Settings::new("a:9092,[::1]:9093")));
    assert_eq!((run.concurrency, run.stock_factor.of(10), run.seed), (8, 9, 42));
    assert_eq!((run.decline_rate(), run.cancel_rate()), (0.0, 1.0));
    assert_eq!((run.output.json, run.output.quiet), (true, true));
    assert_eq!(run.source().expect("generated").len(), 50);
}

#[test]
fn orders_from_a_file_have_no_declines_by_default() {
    let file = run("run --orders a.csv");
    assert_eq!(file.orders, Some("a.csv".into()));
    assert_eq!((file.decline_rate(), file.cancel_rate()), (0.0, 0.0));
    let unlucky = run("run --orders a.csv --decline-rate 0.25 --cancel-rate 0.5");
    assert_eq!((unlucky.decline_rate(), unlucky.cancel_rate()), (0.25, 0.5));
    assert!(matches!(file.source(), Err(InputError::Unreadable { path, .. }) if path.as_os_str() == "a.csv"));
}

#[test]
fn serve_requires_store_and_bus() {
    let line = "serve inventory --store postgresql://shop@db/inventory --bus local: --http 127.0.0.1:8080";
    let Ok(Command::Serve(serve)) = parse(line) else { panic!("not serve") };
    assert_eq!(serve.role, Role::Inventory);
    assert_eq!(serve.store, StoreUrl::Postgres("postgresql://shop@db/inventory".into()));
    assert_eq!(serve.http, "127.0.0.1:8080".parse().ok());
    assert!(serve.shared_as().is_some_and(|name| name.starts_with("shop-")));
    refused("serve all --bus local:", &["--store <URL>"]);
    refused("serve all --store memory:", &["--bus <URL>"]);
    refused("serve till --store memory: --bus local:", &["'till'", "all, order, inventory, payment, notification"]);
}

#[test]
fn run_against_a_remote_shop_needs_a_url_and_no_store() {
    let run = run("run --http http://127.0.0.1:8080/ --generate 5");
    assert_eq!(run.http.expect("a URL").to_string(), "http://127.0.0.1:8080");
    refused("run --http http://a:1 --store memory:", &["--http", "cannot be used with", "--store"]);
    refused("run --http http://a:1 --bus local:", &["cannot be used with", "--bus"]);
    refused("run --http https://a:1", &["TLS is not supported"]);
    refused("run --http http://shop@a:1", &["must not contain a user or a password"]);
    refused("run --http http://a:1/orders", &["nothing may follow the port"]);
    for url in ["a:1", "http://", "8080", "ftp://a:1", "http://a:99999"] {
        refused(&format!("run --http {url}"), &["http://host:port"]);
    }
}

#[test]
fn drain_has_the_defaults_of_run() {
    let Ok(Command::Drain(drain)) = parse("drain --json") else { panic!("not drain") };
    assert_eq!(drain.connection.store, StoreUrl::Sqlite("shop.db".into()));
    assert!(drain.output.json);
}

#[test]
fn wrong_arguments_are_explained() {
    refused("run --orders a.csv --generate 5", &["--orders", "cannot be used with", "--generate"]);
    refused("run --generate 0", &["--generate", "1.."]);
    refused("run --concurrency 0", &["--concurrency", "1..=65536"]);
    refused("run --store mysql://db", &["the scheme \"mysql\"", "memory:, sqlite:PATH, postgres://"]);
    refused("run --store shop.db", &["no scheme", "sqlite:PATH"]);
    refused("run --store sqlite:", &["sqlite:shop.db"]);
    refused("run --store memory:x", &["nothing may follow memory:"]);
    refused("run --store sqlite::memory:", &["memory:, without sqlite"]);
    refused("run --store sqlite://:memory:", &["memory:, without sqlite"]);
    refused("run --store postgres:db", &["postgres://user@host/database"]);
    refused("run --bus amqp://x", &["the scheme \"amqp\"", "local:, kafka://host:port"]);
    refused("run --bus kafka://", &["broker 1 is not host:port"]);
    refused("run --bus kafka:a:9092", &["kafka://host:port"]);
    refused("run --bus kafka://shop@a:9092", &["must not contain a user or a password", "kafka://host:port"]);
    refused("run --bus kafka://a:9092,b", &["broker 2 is not host:port"]);
    refused("run --bus kafka://a:0", &["broker 1 is not host:port"]);
    refused("run --stock-factor 0", &["above 0"]);
    refused("run --stock-factor -1", &["above 0"]);
    refused("run --stock-factor half", &["not a decimal number"]);
    for rate in ["1.01", "-0.1", "NaN", "some"] {
        refused(&format!("run --decline-rate {rate}"), &["from 0 to 1"]);
        refused(&format!("run --cancel-rate {rate}"), &["from 0 to 1"]);
    }
    refused("", &["Usage: sample-shop"]);
}

#[test]
fn help_has_examples() {
    for line in ["--help", "run --help"] {
        refused(line, &["Examples:", "sample-shop run --orders online-retail-2010-12.csv"]);
    }
}

/// Tries every place where a password can appear, combined with other mistakes on the command line.
#[test]
fn errors_show_no_password() {
    for url in [
        "postgers://shop:secret@db/shop",
        "postgers://shop:se@secret@db/shop",
        "postgers://shop:a?secret@db/shop",
        "postgers://db/shop?password=secret",
        "postgers://db/shop?password=a@secret",
        "postgers://shop:secret",
        "postgers://shop:secret,db/shop",
        "postgres:/shop:secret@db/shop",
        "postgres//shop:secret@db/shop",
        "shop:secret@db/shop",
        "secret@db:5432",
        "dbname=shop;password=secret",
        "kafka://shop:secret@a:9092",
        "kafka://shop:a,secret@b:9092",
        "kafka://shop:a/secret@b:9092",
        "kafka:shop:secret@a:9092",
        "kafka://shop:secret",
        "kafka://a:9092?sasl.password=secret&no-value",
        "local:secret@a",
        "memory:secret@a",
        "-postgres://shop:secret@db",
    ] {
        for line in [
            format!("run --store {url}"),
            format!("run --store={url}"),
            format!("run --bus {url}"),
            format!("run --generate {url}"),
            format!("run {url}"),
            url.to_owned(),
            format!("serve {url}"),
            format!("drain --bus={url}"),
        ] {
            let message = parse(&line).map(|command| format!("{command:?}")).expect_err(&line);
            assert!(!message.contains("secret"), "{line}: {message}");
        }
    }
    // A URL that cannot hold a password is quoted in full, so that the user can find a typing error.
    refused("run --store shop.db", &["'shop.db'"]);
    refused("run --store mysql://db:3306/shop", &["'mysql://db:3306/shop'"]);
    refused("run --store postgers://shop:secret@db/shop", &["'postgers://…'", "--store <URL>", "\"postgers\""]);
}

#[test]
fn store_urls_are_shown_without_password() {
    for (url, shown) in [
        ("memory:", "memory:"),
        ("sqlite:shop.db", "sqlite:shop.db"),
        ("sqlite:///var/shop.db", "sqlite:/var/shop.db"),
        ("sqlite://shop.db", "sqlite:shop.db"),
        ("postgres://db/shop", "postgres://db/shop"),
        ("postgres://shop:secret@db:5432/shop", "postgres://shop@db:5432/shop"),
        ("postgres://shop:se@cret@db/shop?password=secret", "postgres://shop@db/shop"),
        ("postgres://shop:se?cret@db/shop", "postgres://…"),
        ("postgres://shop:secret", "postgres://…"),
        ("postgres://shop@[::1]:5432/shop", "postgres://shop@[::1]:5432/shop"),
    ] {
        let parsed: StoreUrl = url.parse().expect(url);
        assert_eq!(parsed.to_string(), shown);
        assert_eq!(format!("{parsed:?}"), shown);
        assert_eq!(parsed.scheme(), shown.split(':').next().unwrap_or_default());
    }
}
