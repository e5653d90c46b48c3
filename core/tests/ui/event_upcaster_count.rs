use serde_json::Value;

fn step(old: Value) -> Result<Value, String> {
    Ok(old)
}

#[derive(annals::Event)]
enum OrderEvent {
    #[event(version = 3, upcasters(step))]
    TooFew,
    #[event(version = 2, upcasters(step, step))]
    TooMany,
    #[event(version = 2)]
    None,
    #[event(version = 2, upcasters())]
    Empty,
    #[event(upcasters(step))]
    WithoutVersion,
}

fn main() {}
