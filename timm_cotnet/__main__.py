"""The package's commands, a line each: `python -m timm_cotnet`."""
import argparse
import sys
from typing import List, Optional

COMMANDS = {
    'demo': 'fine-tunes a small CoTNet on real images, in minutes',
    'explain': 'says which implementation works on each part of a model, and why',
    'recipes': 'writes training recipes for timm\'s train.py, the published ones among them',
    'visualize': 'draws what CoT layers see in images',
    'convert': 'makes safetensors and config of an official checkpoint',
    'detection.convert': 'makes safetensors and config of an official detector',
    'detection.train': 'trains and evaluates detectors on data in COCO\'s layout',
    'detection.shapes': 'draws a small data set for detectors',
    'verify': 'compares the accuracy of converted weights with the published one',
    'export': 'writes a model as a file for ONNX Runtime, OpenVINO, Core ML and others',
    'publish': 'uploads converted weights to the Hub',
    'cards': 'writes the model cards of the Hub repositories',
}


def main(argv: Optional[List[str]] = None) -> int:
    lines = [f'  python -m timm_cotnet.{name:18} {what}' for name, what in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog='python -m timm_cotnet', usage='python -m timm_cotnet.COMMAND [options]',
        description='Contextual Transformer networks for timm. Lists the commands, each of which has a --help.',
        epilog='\n'.join(['commands:', *lines]), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    parser.print_help()
    return 0


if __name__ == '__main__':
    sys.exit(main())
