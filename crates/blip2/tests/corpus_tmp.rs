use blip2::image::{Pixels, decode};
use std::fs;
#[test]
fn corpus() {
    let d = std::env::var("CORPUS").unwrap_or("/tmp/img/corpus".into());
    let mut names: Vec<_> =
        fs::read_dir(&d).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let mut exact = 0;
    for n in names {
        let bytes = fs::read(format!("{d}/{n}")).unwrap();
        let exp = fs::read(format!("{d}/../exp/{n}.raw"));
        match (decode(&bytes, Pixels::Hf), exp) {
            (Ok(i), Ok(e)) => {
                let w = u32::from_le_bytes(e[4..8].try_into().unwrap());
                let h = u32::from_le_bytes(e[0..4].try_into().unwrap());
                if (w, h) != (i.width, i.height) {
                    println!("{n} SIZE {w}x{h} vs {i:?}");
                    continue;
                }
                let e = &e[8..];
                let (mut mx, mut c) = (0, 0);
                for (a, b) in i.data.iter().zip(e) {
                    let d = a.abs_diff(*b);
                    if d > 0 {
                        c += 1
                    }
                    mx = mx.max(d);
                }
                if c > 0 {
                    println!("{n} max {mx} count {:.4}%", 100. * c as f64 / e.len() as f64)
                } else {
                    exact += 1
                }
            }
            (Err(e), Ok(_)) => println!("{n} RUSTERR {e}"),
            (Ok(_), Err(_)) => println!("{n} only PIL fails"),
            (Err(e), _) => println!("{n} both fail {e}"),
        }
    }
    println!("exact {exact}");
}
