"""A model as a file for another runtime: `python -m timm_cotnet.export cotnet50 --output cotnet50.onnx --check`.

A thin command over PyTorch's exporters and the runtimes' own converters. Batch norms are folded first. Needs the extra
of the format: `pip install "timm-cotnet[onnx]"`, `[openvino]`, `[coreml]`; formats of PyTorch need none.
"""
import argparse
import copy
import importlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import timm
import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.utils import reparameterize_model
from torch import Tensor, nn

from .checkpoint import UNLOADABLE, explained

__all__ = ['export', 'quantize_onnx', 'load']

FORMATS = {  # format: (suffix, libraries, what it is)
    'onnx': ('.onnx', ('onnx', 'onnxscript', 'onnxruntime'), 'ONNX, by the exporter that torch.export is the base of'),
    'pt2': ('.pt2', (), "torch.export's own file"),
    'aoti': ('.pt2', (), 'AOTInductor package: compiled for this machine, needs a C++ compiler'),
    'openvino': ('.xml', ('onnx', 'onnxscript', 'openvino'), "OpenVINO's file, with weights in a .bin beside it"),
    'coreml': ('.mlpackage', ('coremltools',), 'Core ML package of one size; runs on Apple devices only'),
}
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05}  # of --check, relative to the largest logit
CALIBRATION = 128  # images
Run = Callable[[Tensor], Tensor]


def export(model: nn.Module, path: Path, format: str, x: Tensor, dynamic: bool = True) -> None:
    """Writes a model in evaluation as a file.

    Args:
        model: Best with folded batch norms; its dtype is that of the file.
        path: File to write; for Core ML a folder.
        format: One of `FORMATS`.
        x: Example of its input, (B, 3, H, W); if dynamic of two images or more, which are not square, and in PyTorch's
            formats of more than 32 pixels each way.
        dynamic: Whether batch, height and width may be others than those of x. Core ML never has that,
            and PyTorch 2.9 to 2.12 guards files of `torch.export` so that sizes at pools are odd or even as those of x.

    Raises:
        ImportError: If a library is missing.
        ValueError: If there is no such format, or if x is no example for other sizes.
    """
    if format not in FORMATS:
        raise ValueError(f'format is {format!r}, expected one of {", ".join(FORMATS)}')
    _check_example(format, x, dynamic)
    for library in FORMATS[format][1]:
        importlib.import_module(library)
    {'onnx': _onnx, 'pt2': _pt2, 'aoti': _aoti, 'openvino': _openvino, 'coreml': _coreml}[format](
        model, path, x, _dynamic_shapes() if dynamic else None)


def _check_example(format: str, x: Tensor, dynamic: bool) -> None:
    if dynamic and format in ('pt2', 'aoti') and min(x.shape[2:]) <= 32:  # maps of one row or column are special
        raise ValueError(f'x is {tuple(x.shape)}, expected more than 32 pixels each way, as sizes may change')


def _dynamic_shapes() -> Tuple[Dict[int, Any]]:
    return ({axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)},)


def _onnx(model: nn.Module, path: Path, x: Tensor, shapes: Optional[Tuple]) -> None:
    torch.onnx.export(
        model, (x,), str(path), dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False,
        input_names=['images'], output_names=['logits'])


def _pt2(model: nn.Module, path: Path, x: Tensor, shapes: Optional[Tuple]) -> None:
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), path)


def _aoti(model: nn.Module, path: Path, x: Tensor, shapes: Optional[Tuple]) -> None:
    from torch._inductor import aoti_compile_and_package

    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        aoti_compile_and_package(program, package_path=str(path))


def _openvino(model: nn.Module, path: Path, x: Tensor, shapes: Optional[Tuple]) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx_path = Path(folder, 'model.onnx')
        _onnx(model, onnx_path, x, shapes)
        openvino.save_model(openvino.convert_model(str(onnx_path)), str(path), compress_to_fp16=False)


def _coreml(model: nn.Module, path: Path, x: Tensor, shapes: Optional[Tuple]) -> None:
    import coremltools

    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(model).float(), (x.float(),)).run_decompositions({})
    precision = coremltools.precision.FLOAT16 if x.dtype == torch.float16 else coremltools.precision.FLOAT32
    coremltools.convert(program, compute_precision=precision, convert_to='mlprogram').save(str(path))


def quantize_onnx(source: Path, path: Path, batches: Iterator[Tensor]) -> None:
    """Writes an ONNX file whose convolutions and classifier compute with 8 bits (static QDQ, filter by filter).

    Args:
        source: ONNX file of a model with folded batch norms, in float32.
        path: File to write.
        batches: Images as the model gets them, (B, 3, H, W), of which the ranges of activations are taken.
    """
    import onnxruntime.quantization as quantization

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            batch = next(batches, None)
            return None if batch is None else {'images': batch.numpy()}

    quantization.quantize_static(
        str(source), str(path), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        op_types_to_quantize=['Conv', 'Gemm'], activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8)


def calibration_batches(
        folder: Path, model: nn.Module, size: Tuple[int, int], number: int, batch_size: int = 1) -> Iterator[Tensor]:
    """Images of a folder, evenly picked, as timm's `validate.py` would give them to the model.

    Args:
        folder: Image folder as timm reads it.
        model: Whose configuration is used.
        size: Height and width.
        number: Of images at most.
        batch_size: Images of each batch; the last image is there several times if they do not suffice.

    Raises:
        ValueError: If there are no images.
    """
    config = resolve_data_config({'input_size': (3, *size)}, model=model)
    dataset = create_dataset('', root=str(folder), transform=create_transform(**config))
    if len(dataset) == 0:
        raise ValueError(f'{folder} holds no images')
    count = min(number, len(dataset))
    for first in range(0, count, batch_size):
        picked = [min(i, count - 1) * len(dataset) // count for i in range(first, first + batch_size)]
        yield torch.stack([dataset[i][0] for i in picked])


def load(path: Path, format: str) -> Run:
    """What runs an exported file in its runtime: (B, 3, H, W) -> (B, num_classes), on the CPU.

    Raises:
        ValueError: If it cannot run here.
    """
    if format == 'onnx':
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        name = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    if format == 'openvino':
        import openvino
        config = dict(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=torch.get_num_threads())
        compiled = openvino.Core().compile_model(str(path), 'CPU', config)
        return lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy())
    if format == 'pt2':
        return torch.export.load(path).module()
    if format == 'aoti':
        from torch._inductor import aoti_load_package
        return aoti_load_package(str(path))
    raise ValueError(f'{format} files run on Apple devices only')


@torch.no_grad()
def check(model: nn.Module, run: Run, images: List[Tensor]) -> float:
    """Prints how the file differs from the model and how fast both are; returns the largest difference.

    Differences are relative to the largest logit, and NaN where a logit is not finite.
    """
    differences = []
    for x in images:
        expected, actual = model(x).float(), run(x).float()
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
        differences.append(difference)
        times = [_milliseconds(lambda: f(x)) for f in (run, model)]
        print(f'{"x".join(map(str, x.shape))}: differs by {difference:.1e} of the largest logit; '
              f'{times[0]:.1f} ms, eager {times[1]:.1f} ms ({torch.get_num_threads()} threads)')
    return torch.tensor(differences).max().item()  # NaN if one is


def _milliseconds(task: Callable[[], object], times: int = 5) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        task()
        taken.append(1e3 * (time.perf_counter() - start))
    return min(taken)


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m timm_cotnet.export', description=__doc__.splitlines()[0],
        epilog='\n'.join(['formats:', *(f'  {name:9} {what[2]}' for name, what in FORMATS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='name of a model in timm, such as cotnet50')
    parser.add_argument('--output', type=Path, required=True, metavar='FILE', help='where to write')
    parser.add_argument('--format', choices=FORMATS, help='default: the first that the suffix of the file stands for')
    parser.add_argument('--checkpoint', default='', metavar='FILE', help='weights to load')
    parser.add_argument('--pretrained', action='store_true', help='published weights')
    parser.add_argument('--num-classes', type=int, metavar='N', help='default: that of the model')
    parser.add_argument('--img-size', type=int, metavar='N', help='default: that of the model')
    parser.add_argument('--batch-size', type=int, default=1, metavar='N', help='of a static file; default: 1')
    parser.add_argument('--dynamic', action='store_true', help='batch, height and width may be any: slower in some')
    parser.add_argument('--half', action='store_true', help='float16 instead of float32')
    parser.add_argument('--int8', type=Path, metavar='FOLDER', help='ONNX in 8 bits; images for the calibration')
    parser.add_argument('--calibration', type=int, default=CALIBRATION, metavar='N', help='number of such images')
    parser.add_argument('--check', action='store_true', help='run the file, compare with PyTorch')
    args = parser.parse_args(argv)
    if args.format is None:
        args.format = next((name for name, (suffix, *_) in FORMATS.items() if suffix == args.output.suffix), None)
    if args.format is None:
        parser.error(f'--output is {args.output}, whose suffix stands for no format: give --format')
    if args.output.suffix != FORMATS[args.format][0]:
        parser.error(f'--output is {args.output}, expected a name that ends in {FORMATS[args.format][0]}')
    if not timm.is_model(args.model):
        parser.error(f'timm knows no model {args.model!r}; timm.list_models() lists them')
    if args.checkpoint and not Path(args.checkpoint).is_file():
        parser.error(f'--checkpoint is {args.checkpoint}, expected a file')
    if args.dynamic and args.format == 'coreml':
        parser.error('--dynamic is not for Core ML, whose files have one size')
    if args.output.is_dir() and args.format != 'coreml':
        parser.error(f'--output is {args.output}, a folder, expected a file to write')
    if args.int8 and (args.format != 'onnx' or args.half):
        parser.error('--int8 is for ONNX in float32: leave --half out, or quantize with the tools of the runtime')
    if args.int8 and not args.int8.is_dir():
        parser.error(f'--int8 is {args.int8}, expected a folder of images')
    for name in ('img_size', 'batch_size', 'calibration'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name.replace("_", "-")} is {value}, expected 1 or more')
    return args


def main(argv: Optional[List[str]] = None) -> int:
    """The command; returns its exit status: 1 if `--check` finds a difference, in 8 bits if a logit is not finite."""
    args = parse_args(argv)
    for library in FORMATS[args.format][1]:
        try:
            importlib.import_module(library)
        except ImportError:
            extra = args.format if args.format in ('openvino', 'coreml') else 'onnx'
            sys.exit(f'{library} is not installed; get it by: pip install "timm-cotnet[{extra}]"')
    try:
        model = timm.create_model(
            args.model, pretrained=args.pretrained, num_classes=args.num_classes, checkpoint_path=args.checkpoint)
    except UNLOADABLE as error:
        sys.exit(f'{args.checkpoint or args.model} cannot be loaded: {explained(error)}')
    if not (args.pretrained or args.checkpoint):
        _let_all_layers_count(model)
    model = reparameterize_model(model.eval())
    dtype = torch.float16 if args.half else torch.float32
    model = model.to(dtype)
    size = args.img_size or model.default_cfg['input_size'][-1]
    x = torch.randn(2, 3, size, size + 32) if args.dynamic else torch.randn(args.batch_size, 3, size, size)
    x = x.to(dtype)

    try:
        _check_example(args.format, x, args.dynamic)
    except ValueError as error:
        sys.exit(f'--img-size is {size}: {error}')
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output.parent).close()
    except OSError as error:
        sys.exit(f'--output is {args.output}, which cannot be written: {error}')
    start = time.time()
    if args.int8:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, 'model.onnx')
            export(model, source, 'onnx', x, args.dynamic)
            try:
                batches = calibration_batches(args.int8, model, (size, size), args.calibration, x.shape[0])
                quantize_onnx(source, args.output, batches)
            except (ValueError, FileNotFoundError, RuntimeError, AssertionError) as error:
                sys.exit(f'--int8 is {args.int8}, and quantizing failed: {error}')
    else:
        export(model, args.output, args.format, x, args.dynamic)
    print(f'{args.output}: {_megabytes(args.output):.1f} MB, written in {time.time() - start:.0f} s')
    if not args.check:
        return 0
    images = [x, torch.randn(1, 3, size, size).to(dtype)] if args.dynamic else [x]
    try:
        worst = check(model, load(args.output, args.format), images)
    except ValueError as error:
        sys.exit(f'--check: {error}')
    if args.int8:
        return int(not worst < float('inf'))  # of random images 8 bits need not be close
    return int(not worst <= TOLERANCES[dtype])


def _let_all_layers_count(model: nn.Module) -> None:
    """Scales that are zero in a fresh network, as of each block's last norm, would hide from `--check` what it does."""
    for module in model.modules():
        scale = module._parameters.get('weight')
        if scale is not None and scale.ndim == 1 and not scale.any():
            nn.init.constant_(scale, 0.25)


def _megabytes(path: Path) -> float:
    beside = path.with_suffix('.bin')  # of OpenVINO
    files = path.rglob('*') if path.is_dir() else [path] + [beside] * (path.suffix == '.xml')
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


if __name__ == '__main__':
    sys.exit(main())
